from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelcases import (
    LAYOUTS,
    SHAPES,
    check_against_float64,
    check_compiled,
    check_penalty,
    check_third_order,
    check_threads,
    dtypes,
    each_kernel,
    need,
    opcheck,
    random,
    saved_bytes,
)
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from fastgan.ops import pixel_norm

module = importlib.import_module("fastgan.ops.pixel_norm")  # the package's attribute of that name is the function


def composed(x: Tensor) -> Tensor:
    """Through the autograd Functions, with the kernels' functions in plain PyTorch."""
    return module._PixelNorm.apply(x, module._Settings(module.PYTORCH_KERNELS, 1e-8))[0]


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


@pytest.mark.parametrize("f", [pixel_norm, composed])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2, 2)])
def test_derivatives(f: object, shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    assert gradcheck(f, x)
    assert gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_and_memory_format(dtype: torch.dtype) -> None:
    x = random(2, 8, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    y = pixel_norm(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), pixel_norm(x.double()), atol=0, rtol=4 * torch.finfo(dtype).eps)


@each_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(poison: None, kernel: tuple[str, str], shape: tuple[int, ...]) -> None:
    for dtype in dtypes(kernel[1]):
        check_against_float64(pixel_norm, kernel, [random(*shape)], dtype, eps=1e-3)


@each_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(poison: None, kernel: tuple[str, str], layout: str) -> None:
    for dtype in dtypes(kernel[1]):
        for shape in ((3, 5, 4, 6), (2, 40, 13, 9)):
            check_against_float64(pixel_norm, kernel, [random(*shape)], dtype, layout)


@each_kernel
@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    half=st.booleans(),
    eps=st.sampled_from([1e-8, 1e-3, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_any_call(kernel: tuple[str, str], shape: list[int], layout: str, half: bool, eps: float, scale: float) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    check_against_float64(pixel_norm, kernel, [random(*shape) * scale], dtype, layout, eps=eps)


@each_kernel
def test_penalty_with_a_constant_seed(kernel: tuple[str, str]) -> None:
    check_penalty(pixel_norm, kernel)


def test_saved_memory() -> None:
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    need(("cpp", "cpu"), pixel_norm, x)
    # The output, a number for each pixel, and the placeholder of x.
    assert saved_bytes(lambda: pixel_norm(x, backend="cpp")) == 4 * (x.numel() + 2 * 16 * 16 + 1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads(channels_last: bool) -> None:
    x = random(2, 40, 37, 41).float()
    check_threads(pixel_norm, x.to(memory_format=torch.channels_last) if channels_last else x)


def test_under_torch_compile() -> None:
    check_compiled(pixel_norm, random(2, 3, 4, 5).float())


@each_kernel
def test_third_derivative_raises(kernel: tuple[str, str]) -> None:
    check_third_order(pixel_norm, kernel, random(2, 3, 2, 2))


def test_opcheck() -> None:
    x = random(2, 3, 4, 5).float()
    need(("cpp", "cpu"), pixel_norm, x)
    fastgan, r = torch.ops.fastgan, torch.rand(2, 1, 4, 5)
    for t in (x, x.to(memory_format=torch.channels_last), x.bfloat16()):
        opcheck(fastgan.pixel_norm_forward.default, (t, 1e-8))
        opcheck(fastgan.pixel_norm_backward.default, (t, t.clone(), r))
        opcheck(fastgan.pixel_norm_second_backward.default, (t, t.clone(), t.clone(), r))


def test_only_needed_gradients_are_computed() -> None:
    x, dy = random(2, 3, 4, 4).float().requires_grad_(), random(2, 3, 4, 4, seed=1).float().requires_grad_()
    need(("cpp", "cpu"), pixel_norm, x)
    found = []
    for backend in ("cpp", "torch"):
        (dx,) = grad(pixel_norm(x, backend=backend), x, dy, create_graph=True)
        found.append(grad(dx.square().sum(), dy, retain_graph=True) + grad(dx.square().sum(), x))
    torch.testing.assert_close(found[0], found[1])


def test_empty() -> None:
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 2, 2)):
        x = torch.zeros(shape, requires_grad=True)
        pixel_norm(x).sum().backward()
        assert x.grad is not None and x.grad.shape == shape


def test_argument_errors() -> None:
    with pytest.raises(ValueError, match=r"x must be \[N, C, ...\], got 1 dimensions"):
        pixel_norm(torch.zeros(3))
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        pixel_norm(torch.zeros(2, 3), eps=-1)
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got torch.int64"):
        pixel_norm(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"backend 'cpp': it supports float32, bfloat16, not torch.float64"):
        pixel_norm(random(2, 3), backend="cpp")
