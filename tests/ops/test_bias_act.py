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

from fastgan.ops import backends, bias_act

module = importlib.import_module("fastgan.ops.bias_act")  # the package's attribute of that name is the function
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "silu")
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")
CURVED = ("tanh", "sigmoid", "silu")


def composed(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Through the autograd Functions, with the kernels' functions in plain PyTorch."""
    settings = module.BiasActSettings(module.PYTORCH_KERNELS, ACTS.index(act), 0.2, 1.3)
    return module._BiasAct.apply(x, bias, settings)[0]


@pytest.mark.parametrize("act", ACTS)
def test_values(act: str) -> None:
    x, bias = [-2.0, -0.5, 0.0, 0.5, 2.0], 0.25
    one = {
        "linear": lambda v: v,
        "relu": lambda v: max(v, 0.0),
        "lrelu": lambda v: v if v > 0 else 0.1 * v,
        "tanh": math.tanh,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "silu": lambda v: v / (1 + math.exp(-v)),
    }[act]
    t = torch.tensor(x, dtype=torch.float64)[:, None]
    y = bias_act(t, torch.tensor([bias], dtype=torch.float64), act, negative_slope=0.1, gain=3.0)
    assert y[:, 0].tolist() == pytest.approx([3 * one(v + bias) for v in x], rel=1e-12)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", ["torch", "composed"])
@pytest.mark.parametrize("biased", [True, False])
def test_derivatives(act: str, form: str, biased: bool) -> None:
    inputs = [random(2, 3, 2, 2).requires_grad_(), *[random(3, seed=1).requires_grad_()] * biased]

    def f(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return composed(x, bias, act) if form == "composed" else bias_act(x, bias, act, gain=1.3, backend="torch")

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("act", ACTS)
def test_second_derivatives_agree_and_are_none_where_they_are_zero(act: str) -> None:
    x, bias = random(2, 3, 2, 2).requires_grad_(), random(3, seed=1).requires_grad_()
    dy = random(2, 3, 2, 2, seed=2).requires_grad_()

    def second(y: Tensor) -> tuple[Tensor | None, ...]:
        dx, db = grad(y, (x, bias), dy, create_graph=True)
        return grad(dx.sin().sum() + db.cos().sum(), (dy, x, bias), allow_unused=True)

    expected = second(bias_act(x, bias, act, gain=1.3, backend="torch"))
    for e, actual in zip(expected, second(composed(x, bias, act)), strict=True):
        if e is None or actual is None:
            assert actual is None and (e is None or not e.any())
        else:
            torch.testing.assert_close(actual, e)
    if act in PIECEWISE_LINEAR:
        assert second(bias_act(x, bias, act, gain=1.3, backend="lean"))[1:] == (None, None)


@each_kernel
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(poison: None, kernel: tuple[str, str], act: str, shape: tuple[int, ...]) -> None:
    for dtype in dtypes(kernel[1]):
        for bias in ([], [random(*shape[1:2], seed=1)]):
            inputs = [random(*shape), *bias]
            check_against_float64(bias_act, kernel, inputs, dtype, act=act, gain=1.4, negative_slope=0.1)


@each_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(poison: None, kernel: tuple[str, str], layout: str) -> None:
    for dtype in dtypes(kernel[1]):
        for act in ("lrelu", "silu"):
            for shape in ((3, 5, 4, 6), (2, 20, 3, 3)):
                check_against_float64(
                    bias_act, kernel, [random(*shape), random(*shape[1:2], seed=1)], dtype, layout, act=act
                )


@each_kernel
@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(ACTS),
    biased=st.booleans(),
    half=st.booleans(),
    gain=st.floats(0.1, 4.0),
    slope=st.floats(0.0, 1.5),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
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
    scale: float,
) -> None:
    inputs = [random(*shape) * scale, *[random(*shape[1:2], seed=1)] * biased]
    dtype = torch.bfloat16 if half else torch.float32
    check_against_float64(bias_act, kernel, inputs, dtype, layout, act=act, gain=gain, negative_slope=slope)


@each_kernel
@pytest.mark.parametrize("act", ["lrelu", "silu"])
def test_penalty_with_a_constant_seed(kernel: tuple[str, str], act: str) -> None:
    check_penalty(bias_act, kernel, act=act, gain=1.4)


def test_float32_bias_of_a_bfloat16_map() -> None:
    x, bias = random(2, 5, 3, 3).bfloat16().requires_grad_(), random(5, seed=1).float().requires_grad_()
    need(("cpp", "cpu"), bias_act, x)
    y = bias_act(x, bias, "silu", backend="cpp")
    dx, db = grad(y, (x, bias), torch.ones_like(y))
    assert (y.dtype, dx.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    expected = bias_act(*wide, "silu", backend="torch")
    # The bias is not rounded first: what is left is the rounding of the result.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(db.double(), grad(expected.sum(), wide[1])[0], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("act", ACTS)
def test_special_values_pass_as_in_pytorch(act: str) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 1e-30, 100.0, -100.0]] * 20)
    need(("cpp", "cpu"), bias_act, x)
    expected = bias_act(x, None, act, backend="torch")
    if act == "silu":  # PyTorch has NaN for the last; the limit is 0
        x, expected = x[:, [0, 1, 3, 4, 5, 7, 8]], expected[:, [0, 1, 3, 4, 5, 7, 8]]
    torch.testing.assert_close(bias_act(x, None, act, backend="cpp"), expected, equal_nan=True, atol=1e-37, rtol=1e-6)


def test_saved_memory() -> None:
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    need(("cpp", "cpu"), bias_act, x)
    size = 4 * x.numel()
    assert saved_bytes(lambda: bias_act(x, None, "lrelu", backend="cpp")) == size
    # The placeholder of x is one element.
    assert saved_bytes(lambda: bias_act(x, None, "tanh", backend="cpp")) == size + 4
    assert saved_bytes(lambda: bias_act(x, None, "linear", backend="cpp")) == 0


@pytest.mark.parametrize("shape", [(2, 40, 37, 41), (300, 129)])
@pytest.mark.parametrize("act", ["lrelu", "silu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_threads(shape: tuple[int, ...], act: str, channels_last: bool) -> None:
    x = random(*shape).float()
    x = x.to(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
    check_threads(bias_act, x, random(*shape[1:2], seed=1).float(), act=act)


@pytest.mark.parametrize("act", ["lrelu", "tanh"])
def test_under_torch_compile(act: str) -> None:
    check_compiled(bias_act, random(2, 3, 4, 5).float(), random(3, seed=1).float(), act=act)


@each_kernel
@pytest.mark.parametrize("act", CURVED)
def test_third_derivative_raises(kernel: tuple[str, str], act: str) -> None:
    check_third_order(bias_act, kernel, random(2, 3, 2, 2), random(3, seed=1), act=act)


def test_piecewise_linear_acts_have_every_order() -> None:
    x, dy = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    (dx,) = grad(bias_act(x, None, "lrelu", backend="lean"), x, dy, create_graph=True)
    (second,) = grad(dx.pow(3).sum(), dy, create_graph=True)
    (third,) = grad(second.sum(), dy)
    slope = torch.where(x > 0, 1.0, 0.2).double()
    torch.testing.assert_close(third, 6 * slope**3 * dy)


@pytest.mark.parametrize("act", ["lrelu", "silu"])
def test_opcheck(act: str) -> None:
    x, bias = random(2, 3, 4, 5).float(), random(3, seed=1).float()
    need(("cpp", "cpu"), bias_act, x)
    fastgan, code = torch.ops.fastgan, ACTS.index(act)
    for t in (x, x.to(memory_format=torch.channels_last), x.bfloat16()):
        opcheck(fastgan.bias_act_forward.default, (t, bias, code, 0.2, 1.4))
        for want_bias in (True, False):
            ref = t.clone()
            opcheck(fastgan.bias_act_backward.default, (t, ref, None, code, 0.2, 1.4, want_bias))
            if act in CURVED:
                arguments = (t, t.clone(), ref, bias, code, 0.2, 1.4, want_bias)
                opcheck(fastgan.bias_act_second_backward.default, arguments)


def test_large_maps_take_the_kernel_in_bfloat16_too() -> None:
    x = torch.zeros(2, 3, 200, 200)
    need(("cpp", "cpu"), bias_act, x)
    for t in (x, x.bfloat16()):
        assert next(iter(backends("bias_act", t))) == "cpp"


def test_empty_inputs_and_options_without_kernels() -> None:
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 2, 2)):
        x, bias = torch.zeros(shape, requires_grad=True), torch.zeros(shape[1], requires_grad=True)
        y = bias_act(x, bias)
        y.sum().backward()
        assert y.shape == shape and x.grad is not None and not bias.grad.any()
    # A kernel reads the slope off the output's sign, which these options spoil; the default takes another form.
    x = random(2, 3).float()
    for options in ({"gain": -1.0}, {"gain": 0.0}, {"negative_slope": -0.1}):
        with pytest.raises(ValueError, match=r"backend 'cpp': it supports only a"):
            bias_act(x, backend="cpp", **options)
        torch.testing.assert_close(bias_act(x, **options), bias_act(x, backend="torch", **options))


def test_argument_errors() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="act must be linear, relu, lrelu, tanh, sigmoid, silu, got 'gelu'"):
        bias_act(x, act="gelu")
    with pytest.raises(ValueError, match=r"bias must be \[3\], one for each channel of x, got shape \(4,\)"):
        bias_act(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"bias must be \[3\], one for each channel of x, got shape \(3, 1\)"):
        bias_act(x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="bias must be on cpu, as x, got meta"):
        bias_act(x, torch.zeros(3, device="meta"))
    with pytest.raises(TypeError, match=r"bias must be torch.float32, as x, or torch.float32, got torch.float64"):
        bias_act(x, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="bias must be a tensor or None, got float"):
        bias_act(x, 1.0)
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got torch.int64"):
        bias_act(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        bias_act([1.0])
    with pytest.raises(ValueError, match=r"x must be \[N, C, ...\], got 1 dimensions"):
        bias_act(torch.zeros(3))
    with pytest.raises(
        ValueError, match="backend must be triton, cuda, cpp, native, lean, torch for bias_act, got 'chunked'"
    ):
        bias_act(x, backend="chunked")


@pytest.mark.parametrize("act", CURVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bias_alone_has_its_second_derivative(act: str, dtype: torch.dtype) -> None:
    """Both if x needs no gradient, and if it does but its gradient is not computed."""
    x = torch.randn(4, 3, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for tracked in (False, True):
        found = []
        for backend in (None, "torch"):
            b = torch.tensor([0.3, -0.7, 1.1], dtype=dtype, requires_grad=True)
            y = bias_act(x.clone().requires_grad_(tracked), b, act, backend=backend)
            (g,) = torch.autograd.grad((y**3).sum(), b, create_graph=True)
            found.append(torch.autograd.grad((g**2).sum(), b)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_bias_with_a_stride() -> None:
    x, bias = torch.randn(2, 3, 4, 4), torch.arange(6.0)[::2]
    torch.testing.assert_close(bias_act(x, bias), bias_act(x, bias, backend="torch"))


@pytest.mark.parametrize("act", ["relu", "lrelu"])
@pytest.mark.parametrize("backend", ["cpp", "lean", "torch"])
def test_nan_propagates(act: str, backend: str) -> None:
    x = torch.tensor([[-1.0, math.nan, 1.0]])
    need((backend, "cpu"), bias_act, x)
    x.requires_grad_()
    y = bias_act(x, None, act, backend=backend)
    (gradient,) = grad(y, x, torch.ones_like(y), create_graph=True)
    assert y.isnan().tolist() == [[False, True, False]]
    assert gradient[0, 1] != 0
