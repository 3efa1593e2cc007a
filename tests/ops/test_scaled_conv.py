from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernelcases import random
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops import (
    avg_pool2d,
    backends,
    conv2d_downsample,
    interpolate_nearest,
    scaled_conv,
    upsample_conv2d,
)


@pytest.fixture(params=["fused", "lean", "native"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The forms of the scaled convolutions, at sizes where only the last is ever the default."""
    monkeypatch.setattr(scaled_conv, "_form", lambda *_: request.param)
    scaled_conv._native_sizes.cache_clear()
    yield request.param
    scaled_conv._native_sizes.cache_clear()


def pixel(x: torch.Tensor, n: int, i: int, y: int, z: int) -> float:
    inside = 0 <= y < x.shape[2] and 0 <= z < x.shape[3]
    return x[n, i, y, z].item() if inside else 0.0


def direct_conv(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """3x3 convolution of same size with zero padding, pixel by pixel."""
    n, i, h, v = x.shape
    out = torch.empty(n, w.shape[0], h, v, dtype=torch.float64)
    for s in range(n):
        for o in range(w.shape[0]):
            for y in range(h):
                for z in range(v):
                    out[s, o, y, z] = bias[o].item() + sum(
                        w[o, c, dy, dz].item() * pixel(x, s, c, y + dy - 1, z + dz - 1)
                        for c in range(i)
                        for dy in range(3)
                        for dz in range(3)
                    )
    return out


def test_upsample_conv2d_matches_loops(form: str) -> None:
    x, w, b = random(1, 2, 2, 3), random(2, 2, 3, 3, seed=1), random(2, seed=2)
    large = torch.empty(1, 2, 4, 6, dtype=torch.float64)
    for y in range(4):
        for z in range(6):
            large[:, :, y, z] = x[:, :, y // 2, z // 2]
    torch.testing.assert_close(interpolate_nearest(x), large, rtol=0, atol=0)
    torch.testing.assert_close(upsample_conv2d(x, w, b), direct_conv(large, w, b))


def test_conv2d_downsample_matches_loops(form: str) -> None:
    x, w, b = random(1, 2, 4, 6), random(2, 2, 3, 3, seed=1), random(2, seed=2)
    full = direct_conv(x, w, b)
    small = torch.empty(1, 2, 2, 3, dtype=torch.float64)
    for y in range(2):
        for z in range(3):
            small[:, :, y, z] = full[:, :, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].sum(dim=(2, 3)) / 4
    torch.testing.assert_close(avg_pool2d(full), small)
    torch.testing.assert_close(conv2d_downsample(x, w, b), small)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "i", "o", "h", "w"), [(2, 3, 5, 8, 6), (1, 1, 1, 2, 2), (3, 4, 2, 16, 16)])
def test_fused_forms_equal_the_two_steps(n: int, i: int, o: int, h: int, w: int, bias: bool, form: str) -> None:
    x, weight = random(n, i, h, w), random(o, i, 3, 3, seed=1)
    b = random(o, seed=2) if bias else None
    up = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, b, padding=1)
    torch.testing.assert_close(upsample_conv2d(x, weight, b), up)
    down = F.avg_pool2d(F.conv2d(x, weight, b, padding=1), 2)
    torch.testing.assert_close(conv2d_downsample(x, weight, b), down)


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_derivatives(op: Callable[..., torch.Tensor], form: str) -> None:
    inputs = tuple(t.requires_grad_() for t in (random(1, 2, 4, 2), random(2, 2, 3, 3, seed=1), random(2, seed=2)))
    assert gradcheck(op, inputs)
    assert gradgradcheck(op, inputs)


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_argument_errors(op: Callable[..., torch.Tensor]) -> None:
    x, w = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 3, 3)
    with pytest.raises(ValueError, match=r"x must be \[N, I, H, W\], got 3 dimensions"):
        op(x[0], w)
    for wrong in (torch.zeros(5, 4, 3, 3), torch.zeros(5, 3, 1, 1), torch.zeros(5, 3, 3)):
        with pytest.raises(ValueError, match=r"w must be \[O, 3, 3, 3\], got shape \(5, .*\)"):
            op(x, wrong)


@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_conv2d_downsample_rejects_odd_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"x must have an even height and width, got \(\d, \d\)"):
        conv2d_downsample(torch.zeros(1, 2, *size), torch.zeros(2, 2, 3, 3))


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_channels_last(op: Callable[..., Tensor], weights: torch.memory_format, form: str) -> None:
    x = random(2, 3, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    w = random(5, 3, 3, 3, seed=1).to(memory_format=weights).requires_grad_()
    kernels = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.convolution.default:
                kernels.append(args[1])
            return function(*args, **(kwargs or {}))

    with Seen():
        y = op(x, w)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if form == "fused":
        assert [k.shape[2] for k in kernels] == [4]
        assert kernels[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, op(x, w, backend="torch"))
    assert gradgradcheck(op, (x, w))


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_inference_mode_before_training(op: Callable[..., Tensor], form: str) -> None:
    scaled_conv._box_on.cache_clear()
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    with torch.inference_mode():
        expected = op(x, w)
        scaled_conv._box_on(x.device, x.dtype, "up")
    torch.testing.assert_close(op(x, w).detach(), expected.clone())
    assert not scaled_conv._box_on(x.device, x.dtype, "up").is_inference()


@pytest.mark.parametrize(
    ("n", "channels", "size"), [(4, 32, 16), (2, 512, 4), (2, 8, 4)], ids=["fused", "lean", "native"]
)
def test_backends_names_the_form_and_autograd_does_not_change_it(n: int, channels: int, size: int) -> None:
    x, w = torch.randn(n, channels, size, size), torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    form = {512: "lean", 8: "native", 32: "fused"}[channels]
    for name, op in (("upsample_conv2d", upsample_conv2d), ("conv2d_downsample", conv2d_downsample)):
        inputs = (x, w) if op is upsample_conv2d else (F.interpolate(x, scale_factor=2), w)
        first, what = next(iter(backends(name, *inputs).items()))
        assert first == form and what.endswith("by the shipped table")
        plain = op(*inputs, backend="torch")
        torch.testing.assert_close(op(*inputs), plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(op(inputs[0].requires_grad_(), w).detach(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_has_its_own_crossover(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(16, 32, 8, 8).to(dtype, memory_format=layout)
    w = (torch.randn(32, 32, 3, 3) / 17).to(dtype, memory_format=layout)
    one_convolution = ("fused", "winograd")  # the second in channels_last, with AVX-512
    assert next(iter(backends("upsample_conv2d", x, w))) in (one_convolution if dtype == torch.float32 else ("native",))
    y, expected = upsample_conv2d(x, w), upsample_conv2d(x, w, backend="torch")
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(y, expected) == (dtype == torch.bfloat16)  # the same ops as in PyTorch, or not
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_symbolic_tracing(op: Callable[..., Tensor]) -> None:
    x, w = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)
    traced = make_fx(lambda x, w: op(x, w), tracing_mode="symbolic")(x, w)
    torch.testing.assert_close(traced(x, w), op(x, w, backend="torch"))


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_autocast_rounds_the_kernel_once(op: Callable[..., Tensor], form: str) -> None:
    x, w = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, w)
    assert y.dtype == torch.bfloat16
    exact = op(x, w)
    assert (y.float() - exact).norm() < 0.005 * exact.norm()
