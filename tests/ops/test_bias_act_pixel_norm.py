from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
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

from fastgan.ops import bias_act_pixel_norm

module = importlib.import_module("fastgan.ops.bias_act_pixel_norm")  # the package's attribute is the function
ACTS = ("linear", "relu", "lrelu")


def composed(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Through the autograd Functions, with the kernels' functions in plain PyTorch."""
    settings = module._Settings(module.PYTORCH_KERNELS, ACTS.index(act), 0.2, 1.3, 1e-2)
    return module._BiasActPixelNorm.apply(x, bias, settings)[0]


def test_equals_its_two_steps() -> None:
    x, bias = random(2, 5, 3, 4), random(5, seed=1)
    expected = F.leaky_relu(x + bias[:, None, None], 0.1) * 3
    expected = expected / (expected.square().mean(dim=1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(bias_act_pixel_norm(x, bias, "lrelu", 0.1, 3.0, 0.5), expected)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", ["torch", "composed"])
@pytest.mark.parametrize("biased", [True, False])
def test_derivatives(act: str, form: str, biased: bool) -> None:
    inputs = [random(2, 3, 2, 2).requires_grad_(), *[random(3, seed=1).requires_grad_()] * biased]

    def f(x: Tensor, bias: Tensor | None = None) -> Tensor:
        if form == "composed":
            return composed(x, bias, act)
        return bias_act_pixel_norm(x, bias, act, gain=1.3, eps=1e-2, backend="torch")

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@each_kernel
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(poison: None, kernel: tuple[str, str], act: str, shape: tuple[int, ...]) -> None:
    for dtype in dtypes(kernel[1]):
        for bias in ([], [random(*shape[1:2], seed=1)]):
            inputs = [random(*shape), *bias]
            check_against_float64(bias_act_pixel_norm, kernel, inputs, dtype, act=act, gain=1.4, eps=1e-2)


@each_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(poison: None, kernel: tuple[str, str], layout: str) -> None:
    for dtype in dtypes(kernel[1]):
        for shape in ((3, 5, 4, 6), (2, 40, 13, 9)):
            inputs = [random(*shape), random(*shape[1:2], seed=1)]
            check_against_float64(bias_act_pixel_norm, kernel, inputs, dtype, layout)


@each_kernel
@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(ACTS),
    biased=st.booleans(),
    half=st.booleans(),
    gain=st.floats(0.1, 4.0),
    slope=st.floats(0.1, 1.5),
)
def test_any_call(
    kernel: tuple[str, str],
    shape: list[int],
    layout: str,
    act: str,
    biased: bool,
    half: bool,
    gain: float,
    slope: float,
) -> None:
    inputs = [random(*shape), *[random(*shape[1:2], seed=1)] * biased]
    dtype = torch.bfloat16 if half else torch.float32
    check_against_float64(
        bias_act_pixel_norm, kernel, inputs, dtype, layout, act=act, gain=gain, negative_slope=slope, eps=1e-2
    )


@each_kernel
def test_penalty_with_a_constant_seed(kernel: tuple[str, str]) -> None:
    check_penalty(bias_act_pixel_norm, kernel, act="lrelu", gain=1.4)


def test_saved_memory() -> None:
    x, bias = torch.randn(2, 8, 16, 16, requires_grad=True), torch.zeros(8)
    need(("cpp", "cpu"), bias_act_pixel_norm, x)
    # The output, a number for each pixel, the placeholder of x, the bias.
    expected = 4 * (x.numel() + 2 * 16 * 16 + 1 + 8)
    assert saved_bytes(lambda: bias_act_pixel_norm(x, bias, backend="cpp")) == expected


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads(channels_last: bool) -> None:
    x = random(2, 40, 37, 41).float()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    check_threads(bias_act_pixel_norm, x, random(40, seed=1).float())


def test_under_torch_compile() -> None:
    check_compiled(bias_act_pixel_norm, random(2, 3, 4, 5).float(), random(3, seed=1).float())


@each_kernel
def test_third_derivative_raises(kernel: tuple[str, str]) -> None:
    check_third_order(bias_act_pixel_norm, kernel, random(2, 3, 2, 2), random(3, seed=1))


def test_opcheck() -> None:
    x, bias, r = random(2, 3, 4, 5).float(), random(3, seed=1).float(), torch.rand(2, 1, 4, 5)
    need(("cpp", "cpu"), bias_act_pixel_norm, x)
    fastgan = torch.ops.fastgan
    for t in (x, x.to(memory_format=torch.channels_last), x.bfloat16()):
        opcheck(fastgan.bias_act_pixel_norm_forward.default, (t, bias, 2, 0.2, 1.4, 1e-8))
        for want_bias in (True, False):
            y = t.clone()
            options = (2, 0.2, 1.4, want_bias)
            opcheck(fastgan.bias_act_pixel_norm_backward.default, (t, y, r, *options))
            arguments = (t, t.clone(), y, r, *options)
            opcheck(fastgan.bias_act_pixel_norm_second_backward.default, arguments)


def test_bias_alone() -> None:
    """The bias is the only input with a gradient, in first and in second order."""
    x, bias = random(2, 8, 4, 4).float(), random(8, seed=1).float().requires_grad_()
    need(("cpp", "cpu"), bias_act_pixel_norm, x)
    found = []
    for backend in ("cpp", "torch"):
        (db,) = grad(bias_act_pixel_norm(x, bias, backend=backend).sin().sum(), bias, create_graph=True)
        found.append((db, *grad(db.square().sum(), bias)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-4)


def test_other_acts_and_empty_inputs_run_in_plain_pytorch() -> None:
    x = random(2, 3, 4, 4).float()
    torch.testing.assert_close(
        bias_act_pixel_norm(x, None, "tanh"), bias_act_pixel_norm(x, None, "tanh", backend="torch")
    )
    with pytest.raises(ValueError, match="backend 'cpp': it supports linear, relu, lrelu, not silu"):
        bias_act_pixel_norm(x, None, "silu", backend="cpp")
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 2, 2)):
        empty = torch.zeros(shape, requires_grad=True)
        bias_act_pixel_norm(empty, torch.zeros(shape[1])).sum().backward()
        assert empty.grad is not None and empty.grad.shape == shape


def test_argument_errors() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="act must be linear, relu, lrelu, tanh, sigmoid, silu, got 'gelu'"):
        bias_act_pixel_norm(x, act="gelu")
    with pytest.raises(ValueError, match=r"bias must be \[3\], one for each channel of x, got shape \(4,\)"):
        bias_act_pixel_norm(x, torch.zeros(4))
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        bias_act_pixel_norm(x, eps=-1)
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got torch.int64"):
        bias_act_pixel_norm(torch.zeros(2, 3, dtype=torch.int64))
