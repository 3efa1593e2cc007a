"""Every op decomposes to ATen where a program is exported or traced, for any batch, and ONNX knows what it becomes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn import EqualizedConv2d, SelfAttention2d
from fastgan.ops.dispatch.backend import OPS


class Call(nn.Module):
    """An op as a module; weights are its parameters."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.function = function
        self.weights = nn.ParameterList([torch.randn(shape, generator=random) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def _attend(x: Tensor, **options: Any) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return ops.scaled_dot_product_attention(rows, rows, rows, **options)


def _attention() -> SelfAttention2d:
    torch.manual_seed(0)
    block = SelfAttention2d(8).eval()
    block.gamma.data.fill_(0.7)
    return block


# Feature maps large enough that outside of an export a kernel would run: 256 positions, half a million products.
CASES: dict[str, nn.Module] = {
    "scaled_dot_product_attention": Call(_attend),
    "causal attention": Call(lambda x: _attend(x, is_causal=True, scale=0.3)),
    "SelfAttention2d": _attention(),
    "bias_act": Call(lambda x, b: ops.bias_act(x, b, "lrelu", gain=1.4), (8,)),
    "bias_act silu": Call(lambda x, b: ops.bias_act(x, b, "silu"), (8,)),
    "pixel_norm": Call(ops.pixel_norm),
    "bias_act_pixel_norm": Call(ops.bias_act_pixel_norm, (8,)),
    "minibatch_stddev": Call(ops.minibatch_stddev),
    "conv2d": Call(lambda x, w, b: ops.conv2d(x, w, b, 2, 1), (6, 8, 3, 3), (6,)),
    "conv_transpose2d": Call(lambda x, w: ops.conv_transpose2d(x, w, None, 2, 1), (8, 6, 4, 4)),
    "linear": Call(lambda x, w: ops.linear(x.flatten(1), w), (5, 8 * 256)),
    "affine_grid_sample": Call(lambda x: ops.affine_grid_sample(x, 0.9 * torch.eye(2, 3).expand(x.shape[0], 2, 3))),
    "avg_pool2d": Call(ops.avg_pool2d),
    "interpolate_nearest": Call(ops.interpolate_nearest),
    "interpolate": Call(lambda x: ops.interpolate(x, (5, 7), mode="area")),
    "relu": Call(ops.relu),
    "leaky_relu": Call(lambda x: ops.leaky_relu(x * 2, 0.2, inplace=True)),
    "hardtanh": Call(ops.hardtanh),
    "relu6": Call(ops.relu6),
    "threshold": Call(lambda x: ops.threshold(x, 0.1, 0.3)),
    "abs": Call(ops.abs),
    "prelu": Call(ops.prelu, (8,)),
    "layer_norm": Call(lambda x, w: ops.layer_norm(x, (16,), w), (16,)),
    "group_norm": Call(lambda x, w: ops.group_norm(x, 4, w), (8,)),
    "instance_norm": Call(ops.instance_norm),
    "pad": Call(lambda x: ops.pad(x, (1, 2, 1, 0), "reflect")),
    "max_pool2d": Call(lambda x: ops.max_pool2d(x, 3, 2, 1)),
    "adaptive_avg_pool2d": Call(lambda x: ops.adaptive_avg_pool2d(x, (3, 5))),
    "adaptive_max_pool2d": Call(lambda x: ops.adaptive_max_pool2d(x, 4)),
    "upfirdn2d": Call(lambda x: ops.upfirdn2d(x, [1.0, 3.0, 3.0, 1.0], up=2, padding=(2, 1), gain=0.06)),
    "blur": Call(ops.blur),
    "upsample_conv2d": Call(ops.upsample_conv2d, (64, 8, 3, 3)),
    "conv2d_downsample": Call(ops.conv2d_downsample, (64, 8, 3, 3)),
    "EqualizedConv2d": EqualizedConv2d(8, 6, 3, resample="up", act="lrelu", normalize=True),
}


def _input(batch: int) -> Tensor:
    return torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(batch))


def _batch(name: str) -> Any:
    """Any batch; for minibatch_stddev several whole groups, since a program has one size of group."""
    return 4 * torch.export.Dim("n", min=2, max=64) if name == "minibatch_stddev" else torch.export.Dim("n", min=1)


def test_every_op_is_a_case() -> None:
    on_critics = {"gradient_penalty", "zero_centered_penalty", "wasserstein_divergence"}
    assert set(OPS) - on_critics <= set(CASES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_torch_export(name: str, grad: bool) -> None:
    module = CASES[name].requires_grad_(grad)
    program = torch.export.export(module, (_input(8),), dynamic_shapes=({0: _batch(name)},))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called and not [target for target in called if not target.startswith(("aten.", "<built-in", "_operator"))]
    for batch in (8, 12):
        torch.testing.assert_close(program.module()(_input(batch)), module(_input(batch)), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # that sizes are looked at
@pytest.mark.parametrize("name", CASES)
def test_tracing(name: str) -> None:
    module = CASES[name].requires_grad_(True)
    traced = torch.jit.trace(module, (_input(8),), check_trace=False)
    assert "fastgan::" not in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
    for batch in (8,) if name == "minibatch_stddev" else (8, 3):  # a trace has one number of groups
        torch.testing.assert_close(traced(_input(batch)), module(_input(batch)), atol=1e-4, rtol=1e-4)


# What the generators have is under ONNX in tests/test_export.py; these are the others, and attention by itself.
@pytest.mark.parametrize(
    "name", ["scaled_dot_product_attention", "SelfAttention2d", "causal attention", "bias_act silu"]
)
def test_onnx(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="extra export: pip install 'fastgan[export]'")
    pytest.importorskip("onnxscript", reason="extra export: pip install 'fastgan[export]'")
    module = CASES[name].requires_grad_(False)
    file = io.BytesIO()
    shapes = {"x": {0: torch.export.Dim("n")}}
    program = torch.onnx.export(module, (_input(8),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    file.write(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: _input(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(_input(batch)), atol=1e-4, rtol=1e-4)
