"""Rectifiers, padding, pooling and resampling: torch's values and gradients, and nothing sent backward that is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernelcases import derivatives, random
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan import ops

IMAGE, LINE, VOLUME = (2, 3, 8, 6), (2, 3, 8), (1, 2, 5, 4, 6)
# Name -> the call, of `ops` or of `torch.nn.functional`, and the shape of its input.
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "relu": (lambda m, x: m.relu(x), IMAGE),
    "relu of a vector": (lambda m, x: m.relu(x), (7,)),
    "leaky_relu": (lambda m, x: m.leaky_relu(x), IMAGE),
    "leaky_relu of a vector": (lambda m, x: m.leaky_relu(x, 0.3), (7,)),
    "leaky_relu, falling": (lambda m, x: m.leaky_relu(x, -0.3), IMAGE),
    "relu6": (lambda m, x: m.relu6(x * 4), IMAGE),
    "hardtanh": (lambda m, x: m.hardtanh(x, -0.5, 1.5), IMAGE),
    "threshold": (lambda m, x: m.threshold(x, 0.2, 0.7), IMAGE),
    "abs": (lambda m, x: (torch if m is F else m).abs(x), IMAGE),
    "pad reflect": (lambda m, x: m.pad(x, (1, 2, 3, 0), "reflect"), IMAGE),
    "pad reflect 1d": (lambda m, x: m.pad(x, (1, 2), mode="reflect"), LINE),
    "pad reflect 3d": (lambda m, x: m.pad(x, (1, 2, 1, 1, 0, 3), mode="reflect"), VOLUME),
    "pad reflect unbatched": (lambda m, x: m.pad(x, (1, 2, 3, 0), "reflect"), IMAGE[1:]),
    "pad replicate": (lambda m, x: m.pad(x, (4, 2, 3, 1), "replicate"), IMAGE),
    "pad replicate 1d": (lambda m, x: m.pad(x, [1, 2], "replicate"), LINE),
    "pad replicate 3d": (lambda m, x: m.pad(x, (1, 2, 1, 1, 0, 3), "replicate"), VOLUME),
    "max_pool2d": (lambda m, x: m.max_pool2d(x, 2), IMAGE),
    "max_pool2d, overlapping": (lambda m, x: m.max_pool2d(x, (3, 2), 1, 1, ceil_mode=True), IMAGE),
    "max_pool2d, dilated": (lambda m, x: m.max_pool2d(x, 2, stride=(2, 1), dilation=2), IMAGE),
    "max_pool2d unbatched": (lambda m, x: m.max_pool2d(x, 2), IMAGE[1:]),
    "adaptive_avg_pool2d": (lambda m, x: m.adaptive_avg_pool2d(x, (3, 4)), IMAGE),
    "adaptive_avg_pool2d, one side": (lambda m, x: m.adaptive_avg_pool2d(x, (None, 2)), IMAGE),
    "adaptive_avg_pool2d unbatched": (lambda m, x: m.adaptive_avg_pool2d(x, 3), IMAGE[1:]),
    "adaptive_max_pool2d": (lambda m, x: m.adaptive_max_pool2d(x, (3, 4)), IMAGE),
    "interpolate area": (lambda m, x: m.interpolate(x, scale_factor=0.6, mode="area"), IMAGE),
    "interpolate area to a size": (lambda m, x: m.interpolate(x, (3, 5), mode="area"), IMAGE),
    "avg_pool2d": (lambda m, x: m.avg_pool2d(x, 2), IMAGE),
    "avg_pool2d 3": (lambda m, x: m.avg_pool2d(x, (3, 3), 3), IMAGE),
    "avg_pool2d, windows": (lambda m, x: m.avg_pool2d(x, (3, 2), (2, 1), (1, 0)), IMAGE),
    "avg_pool2d, overlapping": (lambda m, x: m.avg_pool2d(x, 3, 1, 1, count_include_pad=False), IMAGE),
    "avg_pool2d, all arguments": (lambda m, x: m.avg_pool2d(x, 3, 2, 1, True, False, 5), IMAGE),
    "avg_pool2d unbatched": (lambda m, x: m.avg_pool2d(x, 2), IMAGE[1:]),
}
FLOW_THROUGH: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "adaptive_avg_pool2d, one pixel": (lambda m, x: m.adaptive_avg_pool2d(x, 1), IMAGE),
    "pad constant": (lambda m, x: m.pad(x, (1, 2), value=3.0), IMAGE),
    "pad circular": (lambda m, x: m.pad(x, (1, 2), "circular"), LINE),
    "interpolate nearest": (lambda m, x: m.interpolate(x, scale_factor=2), IMAGE),
    "interpolate bilinear": (lambda m, x: m.interpolate(x, (5, 5), mode="bilinear", align_corners=True), IMAGE),
    "interpolate area 1d": (lambda m, x: m.interpolate(x, 3, mode="area"), LINE),
}
LARGE = 24  # images, so that 2^17 elements are exceeded


def sizes(cases: dict[str, Any]) -> list[tuple[str, bool]]:
    """Every case small, and those of batches of images or rows large too."""
    return [(name, large) for name in cases for large in (False, True) if not large or len(cases[name][1]) in (1, 4)]


def image(shape: tuple[int, ...], large: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    x = random(*shape).to(dtype) * 2
    if large:
        copies = [LARGE * 40, *[1] * (len(shape) - 1)] if len(shape) > 1 else [2**15]
        x = x.repeat(copies) + 0.01 * random(*(a * b for a, b in zip(shape, copies, strict=True)), seed=5).to(dtype)
    return x.requires_grad_()


@pytest.mark.parametrize(("name", "large"), sizes(CASES | FLOW_THROUGH))
def test_equals_torch_to_second_order(name: str, large: bool) -> None:
    f, shape = (CASES | FLOW_THROUGH)[name]
    x = image(shape, large)
    for layout in (torch.contiguous_format, torch.channels_last) if x.ndim == 4 else (torch.contiguous_format,):
        x = x.detach().contiguous(memory_format=layout).requires_grad_()
        found = derivatives(lambda t: f(ops, t), [x], 2)
        expected = derivatives(lambda t: f(F, t), [x], 2)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert f(ops, x).stride() == f(F, x).stride()


@pytest.mark.parametrize(("name", "large"), sizes(CASES))
def test_nothing_is_sent_backward_in_second_order(name: str, large: bool) -> None:
    f, shape = CASES[name]
    x = image(shape, large)

    def second(m: Any) -> Tensor | None:
        y = f(m, x)
        seed = torch.ones_like(y).requires_grad_()
        (gradient,) = torch.autograd.grad(y, x, seed, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [seed, x], allow_unused=True)[1]

    assert second(ops) is None
    sent = second(F)
    assert sent is not None and not sent.any()
    with ops.use_backend("torch"):
        assert second(ops) is not None


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    f, shape = CASES[name]
    x = (random(*(1, 1, 5, 4) if shape == IMAGE else shape) * 2).requires_grad_()
    assert gradcheck(lambda t: f(ops, t).square(), x)
    assert gradgradcheck(lambda t: f(ops, t).square(), x)


IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu": lambda m, x: m.relu(x, inplace=True),
    "leaky_relu": lambda m, x: m.leaky_relu(x, 0.2, inplace=True),
    "relu6": lambda m, x: m.relu6(x, inplace=True),
    "hardtanh": lambda m, x: m.hardtanh(x, -0.5, 1.5, inplace=True),
    "threshold": lambda m, x: m.threshold(x, 0.2, 0.7, inplace=True),
}


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str, large: bool) -> None:
    """Values, aliases and gradients are those of torch; nothing is sent backward; the result is the input."""
    f = IN_PLACE[name]
    leaf = image(IMAGE, large)

    def run(m: Any) -> tuple[list[Tensor], Tensor | None]:
        base = leaf * 1.5
        alias, part = base.view(-1), base[:, 1:]
        y = f(m, base)
        assert y is base
        value = (alias * alias.detach().cos()).sum() + part.sin().sum()
        seed = torch.ones((), dtype=value.dtype, requires_grad=True)
        (first,) = torch.autograd.grad(value, leaf, seed, create_graph=True)
        second = torch.autograd.grad((first * first.detach().cos()).sum(), [leaf, seed], allow_unused=True)
        return [alias, part, first, second[1]], second[0]

    (found, twice), (expected, _) = run(ops), run(F)
    torch.testing.assert_close(found, expected)
    assert twice is not None  # of the sine
    y = f(ops, leaf * 1.0)
    seed = torch.ones_like(y).requires_grad_()
    (gradient,) = torch.autograd.grad(y, leaf, seed, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), [seed, leaf], allow_unused=True)[1] is None


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_on_a_view_and_on_a_leaf(name: str, large: bool) -> None:
    f = IN_PLACE[name]
    leaf = image(IMAGE, large)

    def run(m: Any) -> list[Tensor]:
        base = leaf * 1.5
        f(m, base[:, 1])
        (gradient,) = torch.autograd.grad(base.square().sum(), leaf)
        return [base, gradient]

    torch.testing.assert_close(run(ops), run(F))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        f(ops, leaf)
    without = leaf.detach().clone()
    assert f(ops, without) is without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CASES if "relu" in name or name in ("hardtanh", "threshold", "abs")])
def test_special_values(name: str, dtype: torch.dtype) -> None:
    f, _ = CASES[name]
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 6.0, 0.2]
    x = torch.tensor([values], dtype=dtype)

    def run(m: Any, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = f(m, x)
        return [y, *torch.autograd.grad(y, x, torch.ones_like(y))]

    for a, b in zip(run(ops, x), run(F, x), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("weights", [1, 3])
def test_prelu(weights: int) -> None:
    x, w = random(2, 3, 4, 5).requires_grad_(), (random(weights, seed=1) * 0.3).requires_grad_()
    for a, b in zip(derivatives(ops.prelu, [x, w], 3), derivatives(F.prelu, [x, w], 3), strict=True):
        torch.testing.assert_close(a, b)
    (gradient,) = torch.autograd.grad(ops.prelu(x, w).sum(), x, create_graph=True)
    unused, used = torch.autograd.grad(gradient.square().sum(), [x, w], allow_unused=True)
    assert unused is None and used is not None
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -1.0]])
    w = torch.tensor([0.25])
    torch.testing.assert_close(ops.prelu(special, w), F.prelu(special, w), equal_nan=True)


def direct(x: Tensor, f: Tensor, up: int, down: int, sides: tuple[int, int, int, int], flip: bool) -> Tensor:
    """The definition, pixel by pixel."""
    left, right, top, bottom = sides
    n, c, h, w = x.shape
    canvas = x.new_zeros(n, c, h * up + top + bottom, w * up + left + right)
    canvas[:, :, top : top + h * up : up, left : left + w * up : up] = x
    f = f if flip else f.flip(0, 1)
    rows, columns = canvas.shape[2] - f.shape[0] + 1, canvas.shape[3] - f.shape[1] + 1
    result = x.new_zeros(n, c, rows, columns)
    for i in range(f.shape[0]):
        for j in range(f.shape[1]):
            result += f[i, j] * canvas[:, :, i : i + rows, j : j + columns]
    return result[:, :, ::down, ::down]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_upfirdn2d(up: int, down: int, flip: bool) -> None:
    x, f = random(2, 3, 5, 4).requires_grad_(), random(3, 2, seed=1).requires_grad_()
    sides = (2, 1, 0, 3)
    found = ops.upfirdn2d(x, f, up, down, sides, flip, gain=1.5)
    torch.testing.assert_close(found, 1.5 * direct(x, f, up, down, sides, flip))
    row = random(3, seed=2)
    separable = ops.upfirdn2d(x, row, up, down, sides, flip)
    torch.testing.assert_close(separable, direct(x, torch.outer(row, row), up, down, sides, flip))
    listed = ops.upfirdn2d(x, row.tolist(), up, down, (1, 2))
    torch.testing.assert_close(listed, ops.upfirdn2d(x, row, up, down, (1, 1, 2, 2)))
    assert gradcheck(lambda *t: ops.upfirdn2d(*t, up, down, sides), (x, f))
    assert gradgradcheck(
        lambda t: ops.upfirdn2d(t, f.detach(), up, down, sides), (x[:1, :1].detach().requires_grad_(),)
    )


def test_upfirdn2d_cuts_and_sends_nothing_backward() -> None:
    x = random(2, 3, 6, 6).requires_grad_()
    torch.testing.assert_close(ops.upfirdn2d(x, [1.0], padding=-1), x[:, :, 1:-1, 1:-1])
    (gradient,) = torch.autograd.grad(ops.upfirdn2d(x, [1.0, 3.0], 2, 2, 1).square().sum(), x, create_graph=True)
    assert gradient.requires_grad
    seed = torch.ones(2, 3, 3, 3, dtype=x.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.blur(x, down=2), x, seed, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), [seed, x], allow_unused=True)[1] is None


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "constant"])
def test_blur(mode: str) -> None:
    x = random(2, 3, 6, 5).requires_grad_()
    f = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
    padded = F.pad(x, (1, 1, 1, 1), mode)
    expected = F.conv2d(padded, torch.outer(f, f)[None, None].expand(3, 1, 3, 3), groups=3)
    torch.testing.assert_close(ops.blur(x, padding_mode=mode), expected)
    torch.testing.assert_close(ops.blur(x, (2, 4, 2), mode, down=2), expected[:, :, ::2, ::2])
    if mode != "constant":
        torch.testing.assert_close(ops.blur(torch.ones_like(x)), torch.ones_like(x))


def test_resampling_errors() -> None:
    x = torch.ones(1, 2, 4, 4)
    for call, error, words in [
        (lambda: ops.upfirdn2d(x[0], [1.0]), ValueError, r"x must be \[N, C, H, W\], got 3 dimensions"),
        (lambda: ops.upfirdn2d(x.long(), [1.0]), TypeError, "x must have a floating-point dtype"),
        (lambda: ops.upfirdn2d(x, []), ValueError, r"filter must be \[k\] or \[kH, kW\], got shape"),
        (lambda: ops.upfirdn2d(x, [1.0], up=0), ValueError, "up must be at least 1, got 0"),
        (lambda: ops.upfirdn2d(x, [1.0], down=2.0), TypeError, "down must be an integer, got 2.0"),
        (lambda: ops.upfirdn2d(x, [1.0], padding=(1, 2, 3)), ValueError, "padding must be an integer"),
        (lambda: ops.upfirdn2d(x, [1.0], gain=torch.ones(())), TypeError, "gain must be a number, got a tensor"),
        (lambda: ops.blur(x, [1.0, 1.0]), ValueError, r"filter must be \[k\] with k odd, got shape \(2,\)"),
    ]:
        with pytest.raises(error, match=words):
            call()
