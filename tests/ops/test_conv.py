from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import avg_pool2d, conv2d_downsample, interpolate_nearest, upsample_conv2d


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


def test_upsample_conv2d_matches_loops() -> None:
    x, w, b = random(1, 2, 2, 3), random(2, 2, 3, 3, seed=1), random(2, seed=2)
    large = torch.empty(1, 2, 4, 6, dtype=torch.float64)
    for y in range(4):
        for z in range(6):
            large[:, :, y, z] = x[:, :, y // 2, z // 2]
    torch.testing.assert_close(interpolate_nearest(x), large, rtol=0, atol=0)
    torch.testing.assert_close(upsample_conv2d(x, w, b), direct_conv(large, w, b))


def test_conv2d_downsample_matches_loops() -> None:
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
def test_fused_forms_equal_the_two_steps(n: int, i: int, o: int, h: int, w: int, bias: bool) -> None:
    x, weight = random(n, i, h, w), random(o, i, 3, 3, seed=1)
    b = random(o, seed=2) if bias else None
    up = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, b, padding=1)
    torch.testing.assert_close(upsample_conv2d(x, weight, b), up)
    down = F.avg_pool2d(F.conv2d(x, weight, b, padding=1), 2)
    torch.testing.assert_close(conv2d_downsample(x, weight, b), down)


def test_scale_changes_by_other_factors() -> None:
    x = random(2, 3, 6, 6)
    torch.testing.assert_close(avg_pool2d(interpolate_nearest(x, 3), 3), x)
    assert avg_pool2d(x, 3).shape == (2, 3, 2, 2)
    torch.testing.assert_close(avg_pool2d(x, 3)[0, 0, 1, 0], x[0, 0, 3:6, 0:3].mean())


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_derivatives(op: Callable[..., torch.Tensor]) -> None:
    inputs = tuple(t.requires_grad_() for t in (random(1, 2, 4, 2), random(2, 2, 3, 3, seed=1), random(2, seed=2)))
    assert gradcheck(op, inputs)
    assert gradgradcheck(op, inputs)


@pytest.mark.parametrize("op", [avg_pool2d, interpolate_nearest])
def test_derivatives_of_scale_changes(op: Callable[..., torch.Tensor]) -> None:
    x = random(1, 2, 4, 2).requires_grad_()
    assert gradcheck(lambda t: op(t).square(), x)
    assert gradgradcheck(lambda t: op(t).square(), x)


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_refusals(op: Callable[..., torch.Tensor]) -> None:
    x, w = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 3, 3)
    with pytest.raises(ValueError, match=r"x: had 3 dimensions; it may be \[N, I, H, W\]"):
        op(x[0], w)
    for wrong in (torch.zeros(5, 4, 3, 3), torch.zeros(5, 3, 1, 1), torch.zeros(5, 3, 3)):
        with pytest.raises(ValueError, match=r"w: had shape \(5, .*\); it may be \[O, 3, 3, 3\]"):
            op(x, wrong)


@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_conv2d_downsample_refuses_odd_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"x: had size \(\d, \d\); height and width may be even"):
        conv2d_downsample(torch.zeros(1, 2, *size), torch.zeros(2, 2, 3, 3))
