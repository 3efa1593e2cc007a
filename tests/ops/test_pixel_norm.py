from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import pixel_norm


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 3), (2, 3, 4, 5), (1, 1, 1, 1)])
def test_matches_loops(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    flat, actual = x.reshape(shape[0], shape[1], -1), pixel_norm(x, eps=1e-3).reshape(shape[0], shape[1], -1)
    for n in range(shape[0]):
        for pixel in range(flat.shape[2]):
            vector = flat[n, :, pixel].tolist()
            scale = math.sqrt(sum(v * v for v in vector) / len(vector) + 1e-3)
            assert actual[n, :, pixel].tolist() == pytest.approx([v / scale for v in vector], rel=1e-12)


def test_output_has_unit_mean_square_and_zero_stays_zero() -> None:
    y = pixel_norm(random(4, 16, 3, 3) * 100)
    torch.testing.assert_close(y.square().mean(dim=1), torch.ones(4, 3, 3, dtype=torch.float64))
    zero = torch.zeros(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    out = pixel_norm(zero)
    assert out.abs().max() == 0
    out.sum().backward()
    assert zero.grad is not None
    # The slope at 0 is 1 / sqrt(eps), large and finite.
    torch.testing.assert_close(zero.grad, torch.full_like(zero, 1e4))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2, 2)])
def test_derivatives(shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    assert gradcheck(pixel_norm, x)
    assert gradgradcheck(pixel_norm, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_and_memory_format(dtype: torch.dtype) -> None:
    x = random(2, 8, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    y = pixel_norm(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), pixel_norm(x.double()), atol=4 * torch.finfo(dtype).eps, rtol=0.02)


def test_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match=r"x: had 1 dimensions; it may be \[N, C, ...\]"):
        pixel_norm(torch.zeros(3))
