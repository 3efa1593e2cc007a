from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernelcases import check_errors, laid_out, need, random, rounding_effects
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import affine_grid_sample

MODES = ("reflection", "zeros")
SHAPES = [(3, 2, 8, 8), (2, 3, 5, 7), (1, 1, 1, 1), (2, 4, 6, 1), (2, 1, 33, 20)]


def maps(n: int, scale: float = 1.3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random affine maps, which look far outside of the image; the first is the identity."""
    theta = scale * random(n, 2, 3, seed=5)
    theta[0] = torch.eye(2, 3)
    return theta.to(dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch(shape: tuple[int, ...], mode: str) -> None:
    x, theta = random(*shape).requires_grad_(), maps(shape[0])
    grid = F.affine_grid(theta, list(shape), align_corners=False)
    expected = F.grid_sample(x, grid, padding_mode=mode, align_corners=False)
    y = affine_grid_sample(x, theta, mode)
    torch.testing.assert_close(y, expected)
    seed = random(*shape, seed=1)
    torch.testing.assert_close(torch.autograd.grad(y, x, seed), torch.autograd.grad(expected, x, seed))


@pytest.mark.parametrize("mode", MODES)
def test_derivatives(mode: str) -> None:
    x, theta = random(2, 2, 4, 3).requires_grad_(), maps(2)
    assert gradcheck(lambda t: affine_grid_sample(t, theta, mode).square(), x)
    assert gradgradcheck(lambda t: affine_grid_sample(t, theta, mode).square(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape: tuple[int, ...], mode: str, layout: str, dtype: torch.dtype) -> None:
    """Values and both derivatives against float64, in memory that is full of NaN."""
    need(("cpp", "cpu"), affine_grid_sample, torch.zeros(shape))
    x = laid_out(random(*shape).to(dtype), layout).requires_grad_()
    seed, theta = laid_out(random(*shape, seed=1).to(dtype), layout), maps(shape[0], dtype=torch.float32)

    def run(x: Tensor, seed: Tensor, theta: Tensor, backend: str) -> list[Tensor]:
        seed = seed.detach().requires_grad_()
        y = affine_grid_sample(x, theta, mode, backend=backend)
        (gx,) = torch.autograd.grad(y, x, seed, create_graph=True)
        (gseed,) = torch.autograd.grad(gx, seed, torch.cos(x).detach())
        return [y, gx, gseed]

    def reference() -> list[Tensor]:
        # The positions are float32's: a pixel away, a jump of the image's derivative would not be a kernel's error.
        return run(x.detach().double().requires_grad_(), seed.double(), theta.double(), "torch")

    exact = reference()
    poisoned: list[Tensor] = []
    for _ in range(2):  # what the first run frees, full of NaN by then, the second is likely to get
        found = run(x, seed, theta, "cpp")
        for t in found:
            poisoned.append(t.detach().clone())
            t.detach().fill_(torch.nan)
        del found
    effects = [5 * effect for effect in rounding_effects(reference, exact)]  # a position's error times the size
    check_errors(poisoned[3:], exact, effects, dtype)
    assert (
        affine_grid_sample(x, theta, mode).stride()
        == x.detach()
        .contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
        .stride()
    )


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("size", [8, 7])
def test_permutations_of_pixels_are_exact(size: int, backend: str) -> None:
    """Flips, turns and translations by whole pixels copy: an augmentation made of them loses nothing."""
    x = random(1, 3, size, size, dtype=torch.float32)
    need((backend, "cpu"), affine_grid_sample, x)
    flip = torch.tensor([[[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    assert torch.equal(affine_grid_sample(x, flip, backend=backend), x.flip(3))
    turn = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    assert torch.equal(affine_grid_sample(x, turn, backend=backend), x.rot90(1, (2, 3)))
    shift = torch.tensor([[[1.0, 0.0, 4.0 / size], [0.0, 1.0, -2.0 / size]]])  # 2 pixels to the left, 1 down
    moved = affine_grid_sample(x, shift, "zeros", backend=backend)
    expected = F.pad(x, (0, 2, 1, 0))[:, :, :size, 2:]
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-6)
    reflected = affine_grid_sample(x, shift, backend=backend)
    torch.testing.assert_close(reflected[..., -1], torch.cat([x[:, :, :1], x[:, :, :-1]], 2)[..., -2])


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_maps_that_are_not_finite_do_not_crash(backend: str) -> None:
    x = torch.ones(3, 1, 4, 4)
    need((backend, "cpu"), affine_grid_sample, x)
    theta = torch.eye(2, 3).repeat(3, 1, 1)
    theta[0, 0, 2], theta[1, 1, 2] = math.nan, math.inf
    y = affine_grid_sample(x, theta, backend=backend)
    assert y[0].isnan().all() and y[1].isnan().all() and torch.equal(y[2], x[2])


def test_does_not_depend_on_threads() -> None:
    x, theta = torch.randn(4, 3, 64, 64), maps(4, dtype=torch.float32)
    need(("cpp", "cpu"), affine_grid_sample, x)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            t = x.clone().requires_grad_()
            y = affine_grid_sample(t, theta, backend="cpp")
            found.append((y, *torch.autograd.grad(y, t, x)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_refuses_what_does_not_fit() -> None:
    x, theta = torch.zeros(2, 1, 4, 4), torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got 3 dimensions"):
        affine_grid_sample(x[0], theta)
    with pytest.raises(ValueError, match=r"theta must be \[2, 2, 3\], one map for each image, got \(1, 2, 3\)"):
        affine_grid_sample(x, theta[:1])
    with pytest.raises(ValueError, match="padding_mode must be reflection or zeros, got 'border'"):
        affine_grid_sample(x, theta, "border")
    with pytest.raises(ValueError, match="theta must not require a gradient"):
        affine_grid_sample(x, theta.requires_grad_())
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got torch\.int64"):
        affine_grid_sample(x.long(), theta.detach())
