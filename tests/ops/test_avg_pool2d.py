from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernelcases import check_errors, derivatives, laid_out, random, rounding_effects
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import avg_pool2d, interpolate_nearest, use_backend
from fastgan.ops.avg_pool2d import AVG_POOL2D, is_small_and_even


def test_scale_changes_by_other_factors() -> None:
    x = random(2, 3, 6, 6)
    torch.testing.assert_close(avg_pool2d(interpolate_nearest(x, 3), 3), x)
    assert avg_pool2d(x, 3).shape == (2, 3, 2, 2)
    torch.testing.assert_close(avg_pool2d(x, 3)[0, 0, 1, 0], x[0, 0, 3:6, 0:3].mean())


@pytest.mark.parametrize("op", [avg_pool2d, interpolate_nearest])
def test_derivatives_of_scale_changes(op: Callable[..., torch.Tensor]) -> None:
    x = random(1, 2, 4, 2).requires_grad_()
    assert gradcheck(lambda t: op(t).square(), x)
    assert gradgradcheck(lambda t: op(t).square(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 5, 6, 8), (16, 16, 8, 8)])
def test_small_2x2_mean_equals_pytorch_up_to_rounding(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype, memory_format=layout)
    x[0, 0, 0, 0], x[1, 1, 2, 3], x[2, 4, 5, 7] = float("nan"), float("inf"), -float("inf")
    assert is_small_and_even(x)
    y, expected = avg_pool2d(x), F.avg_pool2d(x, 2)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=rounding, atol=rounding, equal_nan=True)
    assert y.isnan().sum() == 1 and y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (1, 1, 7, 5), (2, 2, 3, 2)])
@pytest.mark.parametrize("k", [2, 3])
def test_avg_pool2d_equals_torch_and_sends_nothing_backward(shape: tuple[int, ...], k: int) -> None:
    x = random(*shape).requires_grad_()
    if min(shape[2:]) < k:
        with pytest.raises(RuntimeError, match="Output size is too small"):  # torch's words
            avg_pool2d(x, k)
        return
    for actual, expected in zip(
        derivatives(lambda t: avg_pool2d(t, k), [x], 2), derivatives(lambda t: F.avg_pool2d(t, k), [x], 2), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    seed = torch.ones_like(avg_pool2d(x, k)).requires_grad_()
    (gradient,) = torch.autograd.grad(avg_pool2d(x, k), x, seed, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), [seed, x], allow_unused=True)[1] is None
    with use_backend("torch"):
        (gradient,) = torch.autograd.grad(avg_pool2d(x, k), x, seed, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), [seed, x], allow_unused=True)[1] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "k"),
    [((2, 3, 6, 8), 2), ((1, 1, 7, 5), 2), ((1, 33, 5, 4), 2), ((2, 17, 9, 11), 3), ((3, 5, 35, 67), 2)],
)
def test_avg_pool2d_kernel(shape: tuple[int, ...], k: int, layout: str, dtype: torch.dtype) -> None:
    if (reason := AVG_POOL2D.implementations["cpp"].unsupported_reason(torch.zeros(shape))) is not None:
        pytest.skip(reason)
    x = laid_out(random(*shape).to(dtype), layout).requires_grad_()
    seed = laid_out(random(*avg_pool2d(x, k).shape, seed=1).to(dtype), layout)

    def run(x: Tensor, seed: Tensor, backend: str) -> list[Tensor]:
        seed = seed.detach().requires_grad_()
        y = avg_pool2d(x, k, backend=backend)
        (gx,) = torch.autograd.grad(y, x, seed, create_graph=True)
        (gseed,) = torch.autograd.grad(gx, seed, torch.cos(x).detach())
        return [y, gx, gseed]

    def reference() -> list[Tensor]:
        return run(x.detach().double().requires_grad_(), seed.double(), "torch")

    exact = reference()
    poisoned: list[Tensor] = []
    for _ in range(2):  # what the first run frees, full of NaN by then, the second is likely to get
        found = run(x, seed, "cpp")
        for t in found:
            poisoned.append(t.detach().clone())
            t.detach().fill_(torch.nan)
        del found
    check_errors(poisoned[3:], exact, rounding_effects(reference, exact), dtype)


def test_avg_pool2d_kernel_does_not_depend_on_threads() -> None:
    x = torch.randn(4, 8, 64, 64)
    if (reason := AVG_POOL2D.implementations["cpp"].unsupported_reason(x)) is not None:
        pytest.skip(reason)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(avg_pool2d(x, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
