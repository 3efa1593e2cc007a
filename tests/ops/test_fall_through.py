"""What torch accepts, the functions with a name of torch's accept as well: they leave it to torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import op_calls
import pytest
import torch
import torch.nn.functional as F
from kernelcases import error, random, rms
from torch import Tensor, fx, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fastgan import ops
from fastgan.ops.fallthrough import FELL_THROUGH


class Scaled(Tensor):
    """A class of tensors that is none of this package's business."""


def attend(module: Any, x: Tensor) -> Any:
    return module.scaled_dot_product_attention(x.flatten(2), x.flatten(2), x.flatten(2))


X, W = random(2, 3, 8, 8), random(4, 3, 3, 3, seed=1)
CALLS: dict[str, Callable[[Any, Callable[[Tensor], Tensor]], Any]] = {
    "conv2d": lambda m, to: m.conv2d(to(X), to(W), padding=1),
    "conv_transpose2d": lambda m, to: m.conv_transpose2d(to(X), to(W.transpose(0, 1).contiguous())),
    "linear": lambda m, to: m.linear(to(X), to(random(5, 8))),
    "avg_pool2d": lambda m, to: m.avg_pool2d(to(X), 2),
    "scaled_dot_product_attention": lambda m, to: attend(m, to(X)),
}


@pytest.fixture
def _counted() -> Iterator[None]:
    FELL_THROUGH.clear()
    yield
    FELL_THROUGH.clear()


@pytest.mark.usefixtures("_counted")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["subclass", "complex", "integer"])
def test_what_is_not_plain_runs_in_torch(name: str, kind: str) -> None:
    to: Callable[[Tensor], Tensor] = {
        "subclass": lambda x: x.as_subclass(Scaled),
        "complex": lambda x: torch.complex(x, x.flip(-1)),
        "integer": lambda x: (x * 3).long(),
    }[kind]
    try:
        expected = CALLS[name](F, to)
    except (RuntimeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            CALLS[name](ops, to)
        return
    found = CALLS[name](ops, to)
    assert type(found) is type(expected)
    assert torch.equal(found.as_subclass(Tensor), expected.as_subclass(Tensor))
    reason = {"subclass": "Scaled", "complex": "torch.complex128", "integer": "torch.int64"}[kind]
    assert {(name, reason): 1} == FELL_THROUGH
    if name != "linear":
        form = "lean" if name != "scaled_dot_product_attention" else "chunked"
        refused = pytest.raises(ValueError, match=f"it does not support {reason}; can run this call: torch")
        with ops.use_backend(form), refused:
            CALLS[name](ops, to)


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_masks_of_torch_that_are_computed(make: Callable[[int, int], Any]) -> None:
    q, k = random(2, 4, 16, 8), random(2, 4, 20, 8, seed=1)
    found = ops.scaled_dot_product_attention(q, k, k, make(16, 20))
    assert type(found) is Tensor
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, k, make(16, 20)))


def test_nested_and_sparse_tensors() -> None:
    parts = [random(3, 8), random(5, 8, seed=1)]
    weight = random(4, 8, seed=2)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        found = ops.linear(nested, weight).unbind()
        torch.testing.assert_close(list(found), [F.linear(part, weight) for part in parts])
    rows = torch.nested.nested_tensor([p[None] for p in parts], layout=torch.jagged).transpose(1, 2)
    assert ops.scaled_dot_product_attention(rows, rows, rows).is_nested
    torch.testing.assert_close(ops.linear(parts[0].to_sparse(), weight), F.linear(parts[0], weight))


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.conv2d(X, W, stride=True),
        lambda: ops.conv2d(X, W, stride=(True, 1)),
        lambda: ops.conv2d(X, W, stride=2.0),
        lambda: ops.conv2d(X, W, padding=True),
        lambda: ops.conv2d(X, W, groups=True),
        lambda: ops.conv_transpose2d(X, W.transpose(0, 1), output_padding=False),
        lambda: ops.scaled_dot_product_attention(X, X, X, is_causal=1),
        lambda: ops.scaled_dot_product_attention(X, X, X, enable_gqa=0),
    ],
)
def test_what_torch_refuses_by_type_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="must be"):
        call()


def test_what_torch_accepts_as_an_integer_is_accepted() -> None:
    for two in (2, numpy.int64(2), torch.tensor(2), [2], (2, 2), torch.Size([2, 2])):
        torch.testing.assert_close(ops.conv2d(X, W, stride=two), F.conv2d(X, W, stride=2))


REPLACED: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(8, 4)(torch.ones(2, 8)),
    "conv2d": lambda: nn.Conv2d(3, 4, 3)(torch.ones(1, 3, 8, 8)),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(3, 4, 3)(torch.ones(1, 3, 8, 8)),
    "avg_pool2d": lambda: nn.AvgPool2d(2)(torch.ones(1, 3, 9, 8)),
    "leaky_relu": lambda: nn.LeakyReLU()(torch.ones(1, 3)),
    "interpolate": lambda: nn.Upsample(scale_factor=2)(torch.ones(1, 3, 4, 4)),
    "scaled_dot_product_attention": lambda: nn.MultiheadAttention(8, 2)(*[torch.ones(3, 2, 8)] * 3, need_weights=False),
}


@pytest.mark.parametrize("name", REPLACED)
def test_torchs_function_may_be_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.linear = ops.linear` is no endless recursion, in plain PyTorch's form either."""
    function = getattr(ops, name)
    for backend in (None, "torch"):
        monkeypatch.setattr(F, name, function)
        with ops.use_backend(backend):
            REPLACED[name]()


# A map of its own for the batch: that of the table asks for sizes.
TURN = torch.tensor([[[0.9, -0.3, 0.1], [0.2, 1.1, -0.1]]]).repeat(2, 1, 1)
TRACED = {**op_calls.CALLS, "affine_grid_sample": lambda x: ops.affine_grid_sample(x, TURN)}


@pytest.mark.parametrize("name", TRACED)
def test_a_symbolic_trace_has_a_call_of_the_op(name: str) -> None:
    traced = fx.symbolic_trace(TRACED[name])
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called[-1] is getattr(ops, name.split()[0])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(traced(x), TRACED[name](x))


@pytest.mark.parametrize("op", [ops.upsample_conv2d, ops.conv2d_downsample])
def test_a_symbolic_trace_keeps_the_arguments(op: Callable[..., Tensor]) -> None:
    w = torch.randn(4, 3, 3, 3)
    layer = nn.Conv2d(3, 4, 3)  # its parameters are proxies too

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return op(x, self.layer.weight, self.layer.bias, "silu", gain=0.5)

    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fx.symbolic_trace(Block())(x), Block()(x))
    assert torch.equal(fx.symbolic_trace(lambda w: op(x, w))(w), op(x, w))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        op([1.0], w, act="relu")


@pytest.mark.parametrize("size", [8, 128])
def test_the_result_of_lrelu_may_be_changed_in_place_at_every_size(size: int) -> None:
    x = torch.randn(2, 8, size, size, requires_grad=True)
    found = ops.bias_act(x, gain=0.5).add_(1).square().sum()
    expected = (0.5 * F.leaky_relu(x, 0.2)).add_(1).square().sum()
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


def test_the_result_of_chunked_attention_may_be_changed_in_place() -> None:
    q = random(2, 20, 8).requires_grad_()
    found, expected = (
        ops.scaled_dot_product_attention(q, q, q, backend=name).mul_(2).square().sum() for name in ("chunked", "torch")
    )
    torch.testing.assert_close(torch.autograd.grad(found, q), torch.autograd.grad(expected, q))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_chunked_attention_of_a_peaked_softmax(scale: float, dtype: torch.dtype) -> None:
    """Within twice the error of plain products in the same dtype."""
    tensors = [(random(2, 2, 64, 16, seed=i) * 2).to(dtype) for i in range(3)]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        y = ops.scaled_dot_product_attention(*leaves, scale=scale, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    exact = run(torch.float64, "torch")
    for found, plain, right in zip(run(dtype, "chunked"), run(dtype, "torch"), exact, strict=True):
        ours, theirs = (error(t, right) / rms(right) for t in (found, plain))
        assert ours <= 2 * theirs + 1e-4, (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_attention_of_large_logits(dtype: torch.dtype) -> None:
    leaves = [(random(1, 2, 32, 8, seed=i) * 100).to(dtype).requires_grad_() for i in range(3)]
    y = ops.scaled_dot_product_attention(*leaves, scale=1e4, backend="chunked")
    torch.testing.assert_close(y, ops.scaled_dot_product_attention(*leaves, scale=1e4, backend="torch"))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), leaves))
