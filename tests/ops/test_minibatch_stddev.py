from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelcases import (
    LAYOUTS,
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
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import minibatch_stddev

module = importlib.import_module("fastgan.ops.minibatch_stddev")  # the package's attribute is the function


def composed(x: torch.Tensor, group: int, features: int, eps: float) -> torch.Tensor:
    """Through the autograd Functions, with the kernels' functions in plain PyTorch; `group` divides the batch."""
    return module._MinibatchStddev.apply(x, module._Settings(module.PYTORCH_KERNELS, group, features, eps))


def direct(x: torch.Tensor, group: int, features: int, eps: float) -> list[list[float]]:
    """The appended values, [N][features], sample by sample; `group` divides the batch."""
    n, c, h, w = x.shape
    values = x.tolist()
    groups, chunk = n // group, c // features
    appended = []
    for i in range(n):
        members = [j for j in range(n) if j % groups == i % groups]
        assert len(members) == group and i in members
        row = []
        for f in range(features):
            total = 0.0
            for channel in range(f * chunk, (f + 1) * chunk):
                for y in range(h):
                    for z in range(w):
                        seen = [values[j][channel][y][z] for j in members]
                        mean = sum(seen) / group
                        total += math.sqrt(sum((s - mean) ** 2 for s in seen) / group + eps)
            row.append(total / (chunk * h * w))
        appended.append(row)
    return appended


@pytest.mark.parametrize(
    ("n", "requested", "used", "features"),
    [
        (8, 4, 4, 1),  # two strided groups
        (12, 4, 4, 3),
        (4, 4, 4, 2),  # one group
        (6, 4, 3, 1),  # 4 does not divide 6; 3 is the largest divisor below it
        (5, 4, 1, 1),  # a prime batch: groups of one
        (5, 8, 5, 2),  # fewer samples than requested
        (9, 8, 3, 6),
        (1, 4, 1, 1),
        (4, 1, 1, 1),
    ],
)
def test_matches_loops(n: int, requested: int, used: int, features: int) -> None:
    x = random(n, 6, 2, 3)
    y = minibatch_stddev(x, requested, features, eps=1e-3)
    assert y.shape == (n, 6 + features, 2, 3)
    assert torch.equal(y[:, :6], x)
    expected = torch.tensor(direct(x, used, features, 1e-3), dtype=torch.float64)
    torch.testing.assert_close(y[:, 6:], expected[:, :, None, None].expand(n, features, 2, 3), rtol=1e-12, atol=0)


def test_defaults_are_groups_of_four_and_one_feature() -> None:
    x = random(8, 3, 2, 2)
    expected = torch.tensor(direct(x, 4, 1, 1e-8), dtype=torch.float64)
    torch.testing.assert_close(minibatch_stddev(x)[:, 3:, 0, 0], expected, rtol=1e-12, atol=0)


def test_groups_do_not_see_each_other() -> None:
    x = random(8, 2, 2, 2).requires_grad_()
    minibatch_stddev(x, 4)[1, 2].sum().backward()
    assert x.grad is not None
    touched = [i for i in range(8) if x.grad[i].abs().max() > 0]
    assert touched == [1, 3, 5, 7]


@pytest.mark.parametrize(("n", "group", "features"), [(4, 2, 1), (3, 3, 2), (1, 4, 1)])
def test_derivatives(n: int, group: int, features: int) -> None:
    x = random(n, 2, 2, 1).requires_grad_()
    # With groups of one the variance is the constant eps, so eps must not be near the checker's step.
    assert gradcheck(lambda t: minibatch_stddev(t, group, features, eps=1e-2), x)
    assert gradgradcheck(lambda t: minibatch_stddev(t, group, features, eps=1e-2), x)
    assert gradcheck(lambda t: composed(t, min(group, n), features, eps=1e-2), x)
    assert gradgradcheck(lambda t: composed(t, min(group, n), features, eps=1e-2), x)


def test_equal_samples_have_finite_derivatives() -> None:
    x = random(1, 3, 2, 2).expand(4, 3, 2, 2).clone().requires_grad_()
    (first,) = torch.autograd.grad(minibatch_stddev(x)[:, 3:].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * random(4, 3, 2, 2, seed=1)).sum(), x)
    # The mean of four equal numbers is exact, so the deviation is 0, and so is the slope of its square.
    assert first.abs().max() < 1e-9
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # Squares of 300 overflow float16.
    x = (random(4, 2, 3, 3) * 300).to(dtype)
    y = minibatch_stddev(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, minibatch_stddev(x.double()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_argument_errors() -> None:
    x = torch.zeros(4, 6, 2, 2)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got 2 dimensions"):
        minibatch_stddev(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        minibatch_stddev(x, 0)
    for features in (0, 4):
        with pytest.raises(ValueError, match=f"num_features must be a divisor of the 6 channels of x, got {features}"):
            minibatch_stddev(x, 4, features)
    with pytest.raises(TypeError, match=r"group_size must be an integer, got 2.0"):
        minibatch_stddev(x, 2.0)
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got torch.int64"):
        minibatch_stddev(x.long())
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        minibatch_stddev(x, eps=-1)
    with pytest.raises(ValueError, match="backend 'cpp': it supports only a positive eps"):
        minibatch_stddev(x, eps=0, backend="cpp")


CASES = [
    ((1, 1, 1, 1), 4, 1),
    ((4, 3, 5, 7), 4, 1),
    ((6, 4, 3, 3), 4, 2),  # groups of three, strided by two
    ((8, 6, 5, 5), 2, 6),
    ((5, 2, 33, 17), 5, 1),
    ((12, 40, 9, 7), 4, 1),
    ((3, 600, 3, 2), 3, 4),
    ((40, 3, 2, 2), 40, 1),
]


@each_kernel
@pytest.mark.parametrize(("shape", "group", "features"), CASES, ids=str)
def test_kernels(poison: None, kernel: tuple[str, str], shape: tuple[int, ...], group: int, features: int) -> None:
    for dtype in dtypes(kernel[1]):
        for layout in ("contiguous", "channels_last"):
            check_against_float64(
                minibatch_stddev,
                kernel,
                [random(*shape)],
                dtype,
                layout,
                group_size=group,
                num_features=features,
                eps=0.1,
            )


def test_second_derivatives_of_groups_that_hardly_differ() -> None:
    """Rounding of a mean far from 0 is a good part of so small a deviation: the C++ kernel takes it out again, and in
    plain PyTorch it meets no mean of the cotangent."""
    x, u = (1000 + 0.01 * random(8, 4, 3, 3)).float(), (100 + random(8, 4, 3, 3, seed=1)).float()
    t = random(2, 2, seed=2).float()
    exact = module.second_backward(u.double(), x.double(), t.double(), 4, 2, 1e-8)

    def close(found: tuple[torch.Tensor, torch.Tensor], error: float) -> None:
        for actual, expected in ((found[0][:, 4:], exact[0][:, 4:]), (found[1], exact[1])):
            assert (actual.double() - expected).norm() < error * expected.norm()

    close(module.second_backward(u, x, t, 4, 2, 1e-8), 0.02)
    if (reason := module.OP.implementations["cpp"].unsupported_reason(torch.zeros(4, 1, 1, 1))) is not None:
        pytest.skip(reason)
    close(torch.ops.fastgan.minibatch_stddev_second_backward(u, x, t, 4, 2, 1e-8), 1e-3)


@each_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(poison: None, kernel: tuple[str, str], layout: str) -> None:
    for dtype in dtypes(kernel[1]):
        check_against_float64(minibatch_stddev, kernel, [random(8, 6, 12, 11)], dtype, layout, eps=0.1)


@each_kernel
@settings(max_examples=25)
@given(
    n=st.integers(1, 9),
    features=st.integers(1, 3),
    chunk=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    group=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    half=st.booleans(),
)
def test_any_call(
    kernel: tuple[str, str],
    n: int,
    features: int,
    chunk: int,
    size: tuple[int, int],
    group: int,
    layout: str,
    half: bool,
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    x = random(n, features * chunk, *size)
    check_against_float64(
        minibatch_stddev, kernel, [x], dtype, layout, group_size=group, num_features=features, eps=0.1
    )


@each_kernel
def test_memory_format_of_the_result(kernel: tuple[str, str]) -> None:
    name, device = kernel
    for channels_last in (False, True):
        format = torch.channels_last if channels_last else torch.contiguous_format
        x = random(4, 3, 5, 5).to(device, torch.float32).contiguous(memory_format=format)
        need(kernel, minibatch_stddev, x)
        assert minibatch_stddev(x, backend=name).is_contiguous(memory_format=format)


@each_kernel
def test_penalty_with_a_constant_seed(kernel: tuple[str, str]) -> None:
    check_penalty(minibatch_stddev, kernel, eps=0.1)


def test_saved_memory() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    need(("cpp", "cpu"), minibatch_stddev, x)
    assert saved_bytes(lambda: minibatch_stddev(x, backend="cpp")) == 4 * x.numel()


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads(channels_last: bool) -> None:
    x = random(8, 10, 37, 41).float()
    check_threads(minibatch_stddev, x.to(memory_format=torch.channels_last) if channels_last else x)


def test_under_torch_compile() -> None:
    check_compiled(minibatch_stddev, random(4, 3, 4, 5).float())


@each_kernel
def test_third_derivative_raises(kernel: tuple[str, str]) -> None:
    check_third_order(minibatch_stddev, kernel, random(4, 3, 2, 2))


def test_opcheck() -> None:
    x = random(4, 3, 4, 5).float()
    need(("cpp", "cpu"), minibatch_stddev, x)
    fastgan, rest = torch.ops.fastgan, (2, 1, 1e-8)
    for t in (x, x.to(memory_format=torch.channels_last), x.bfloat16()):
        opcheck(fastgan.minibatch_stddev_forward.default, (t, *rest))
        dy = torch.cat([t, t[:, :1]], dim=1)
        opcheck(fastgan.minibatch_stddev_backward.default, (dy, t, *rest))
        arguments = (t.clone(), t, torch.ones(2, 1), *rest)
        opcheck(fastgan.minibatch_stddev_second_backward.default, arguments)


def test_empty() -> None:
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2)):
        x = torch.zeros(shape, requires_grad=True)
        y = minibatch_stddev(x)
        y.sum().backward()
        assert y.shape == (shape[0], 4, *shape[2:]) and x.grad is not None
