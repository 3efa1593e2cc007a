"""What other projects do with the ops: odd arguments, other classes of tensors, transforms, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgan import ops
from fastgan.ops import use_backend

NUMBERS: dict[str, Callable[[Any], object]] = {
    "negative_slope": lambda value: ops.bias_act(X, negative_slope=value),
    "gain": lambda value: ops.bias_act(X, gain=value),
    "eps": lambda value: ops.pixel_norm(X, eps=value),
    "scale": lambda value: ops.scaled_dot_product_attention(X, X, X, scale=value),
    "dropout_p": lambda value: ops.scaled_dot_product_attention(X, X, X, dropout_p=value),
}
X = torch.ones(1, 2, 4, 4)
W = torch.ones(2, 2, 3, 3)
NUMBERS |= {
    "gain ": lambda value: ops.upsample_conv2d(X, W, gain=value),
    " gain": lambda value: ops.bias_act_pixel_norm(X, gain=value),
    "eps ": lambda value: ops.minibatch_stddev(X, eps=value),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_tensors_are_rejected_as_numbers(name: str) -> None:
    """A learnable one would get no gradient, without an error."""
    NUMBERS[name](0.5)
    NUMBERS[name](1)
    with pytest.raises(TypeError, match=f"^{name.strip()} must be a number, got a tensor"):
        NUMBERS[name](torch.nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(TypeError, match=f"^{name.strip()} must be a number, got '1'"):
        NUMBERS[name]("1")


def test_use_backend_that_an_inner_convolution_lacks() -> None:
    for size in (8, 64):
        x, w = torch.randn(8, 32, size, size), torch.randn(32, 32, 3, 3)
        if "cannot run" in ops.backends("conv2d", x, w)["cpp"]:
            pytest.skip("the C++ kernels cannot run here")
        expected = F.avg_pool2d(F.conv2d(x, w, padding=1), 2)
        with use_backend("cpp"):
            torch.testing.assert_close(ops.conv2d_downsample(x, w), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("op", [ops.upsample_conv2d, ops.conv2d_downsample])
def test_backend_torch_includes_the_act(op: Callable[..., Tensor]) -> None:
    x, w = (
        torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 2, 3, 3, dtype=torch.float64),
    )
    value = op(x, w, None, "silu", backend="torch").sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.square().sum()
    assert value > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_do_not_alias_inputs(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, dtype=dtype)
    ops.bias_act(x, None, "linear").add_(1)
    assert (x == 1).all()


FAKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bias_act": lambda x, w: ops.bias_act(x),
    "bias_act relu": lambda x, w: ops.bias_act(x, None, "relu"),
    "affine_grid_sample": lambda x, w: ops.affine_grid_sample(x, torch.zeros(8, 2, 3)),
    "avg_pool2d": lambda x, w: ops.avg_pool2d(x, 3),
    "upsample_conv2d": ops.upsample_conv2d,
    "conv2d_downsample": ops.conv2d_downsample,
    "pixel_norm": lambda x, w: ops.pixel_norm(x),
    "minibatch_stddev": lambda x, w: ops.minibatch_stddev(x),
}


@pytest.mark.parametrize("place", ["fake", "meta"])
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", FAKED)
def test_fake_and_meta_tensors(name: str, size: int, place: str) -> None:
    """An op among fake tensors, or where new tensors go to the meta device, gives shapes; later calls are as before."""
    with FakeTensorMode() if place == "fake" else torch.device("meta"):
        x, w = torch.empty(8, 32, size, size, requires_grad=True), torch.empty(32, 32, 3, 3)
        fake = FAKED[name](x, w)
        fake.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    real = FAKED[name](torch.randn(8, 32, size, size, requires_grad=True), torch.randn(32, 32, 3, 3))
    assert type(real) is Tensor and real.device.type == "cpu" and real.shape == fake.shape
    assert real.isfinite().all()
    real.sum().backward()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", [ops.conv2d, ops.upsample_conv2d, ops.conv2d_downsample])
def test_a_head_of_one_channel_in_channels_last(op: Callable[..., Tensor], dtype: torch.dtype, batch: int) -> None:
    last = {"memory_format": torch.channels_last}
    x = torch.randn(batch, 8, 8, 8, dtype=dtype).to(**last).requires_grad_()
    w = torch.randn(1, 8, 3, 3, dtype=dtype).to(**last).requires_grad_()
    value = op(x, w).square().sum()
    gradients = torch.autograd.grad(value, (x, w), create_graph=True)
    sum((g.square().sum() for g in gradients), torch.zeros(())).backward()
    assert x.grad is not None and w.grad is not None
    if op is ops.conv2d:
        assert ops.conv2d(x, torch.randn(4, 8, 3, 3, dtype=dtype).to(**last)).stride(1) == 1


@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.jacfwd])
def test_linear_in_transforms(transform: Callable[..., Any]) -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    if transform is torch.func.jacfwd:
        torch.testing.assert_close(
            torch.func.jacfwd(lambda t: ops.linear(x, t))(w), torch.func.jacfwd(lambda t: F.linear(x, t))(w)
        )
        return
    ours, plain = (torch.func.jvp(lambda t, f=f: f(x, t), (w,), (w,)) for f in (ops.linear, F.linear))
    torch.testing.assert_close(ours, plain)


X_1 = torch.ones(1, 2, 4, 4)
GEOMETRIES: list[tuple[Callable[[], object], str]] = [
    (lambda: ops.conv2d(X_1, W, stride=0), r"stride must be at least 1, got \(0, 0\)"),
    (lambda: ops.conv2d(X_1, W, stride=(1, -1)), r"stride must be at least 1, got \(1, -1\)"),
    (lambda: ops.conv2d(X_1, W, padding=-1), r"padding must be at least 0, got \(-1, -1\)"),
    (lambda: ops.conv2d(X_1, W, dilation=0), r"dilation must be at least 1, got \(0, 0\)"),
    (
        lambda: ops.conv2d(X_1, torch.ones(2, 2, 5, 3)),
        r"weight must fit into the padded image of size \(4, 4\), got shape \(2, 2, 5, 3\)",
    ),
    (
        lambda: ops.conv_transpose2d(X_1, W, stride=2, output_padding=2),
        r"output_padding must be at least 0 and below stride \(2, 2\) or dilation \(1, 1\), got \(2, 2\)",
    ),
]


@pytest.mark.parametrize(("call", "words"), GEOMETRIES)
def test_geometry_errors(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_largest_kernels_that_fit() -> None:
    x, w = torch.randn(1, 2, 4, 5), torch.randn(3, 2, 4, 3)
    torch.testing.assert_close(ops.conv2d(x, w, dilation=(1, 2)), F.conv2d(x, w, dilation=(1, 2)))
    torch.testing.assert_close(ops.conv2d(x[0], w), F.conv2d(x[0], w))
    near = {"stride": 2, "output_padding": 2, "dilation": 3}
    v = torch.randn(2, 3, 3, 3)
    torch.testing.assert_close(ops.conv_transpose2d(x, v, **near), F.conv_transpose2d(x, v, **near))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("backend", ["chunked", "cpp"])
def test_causal_attention_with_a_scale_that_is_not_positive(backend: str, scale: float) -> None:
    q, k, v = (torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3))
    if "cannot run" in ops.backends("scaled_dot_product_attention", q, k, v)[backend]:
        pytest.skip(f"{backend} cannot run here")
    found = []
    for name in (backend, "torch"):
        y = ops.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, backend=name)
        found.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
