"""R1 and R2 by finite differences: what the estimate is, on paper and on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgan.ops import zero_centered_penalty


def estimate(critic: Callable[[Tensor], Any], x: Tensor, **options: Any) -> Tensor:
    return zero_centered_penalty(critic, x, method="finite-difference", **options)


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
U = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_linear_critic_on_paper() -> None:
    weight = torch.arange(6.0, dtype=torch.float64)
    for sigma in (1e-3, 0.5):
        found = estimate(lambda x: x @ weight + 3, X, direction=U, sigma=sigma)
        torch.testing.assert_close(found, (U @ weight).square().mean())


def test_small_steps_give_the_slope_along_the_direction_and_its_derivatives() -> None:
    model = critic()
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    expected = (slope * U).sum(1).square().mean()
    found = estimate(model, X, direction=U, sigma=1e-6)
    weights = list(model.parameters())[:-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True)
    for ours, exact in pairs:
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def test_the_mean_over_directions_is_the_exact_penalty() -> None:
    model, generator = critic(), torch.Generator().manual_seed(0)
    many = X[:1].expand(200_000, 6)
    found = estimate(model, many, sigma=1e-4, generator=generator)
    exact = zero_centered_penalty(model, X[:1])
    # The standard deviation of one term is sqrt(2) of the mean: 5 of those of the mean of all.
    assert abs(found / exact - 1) < 5 * 2**0.5 / 200_000**0.5


def test_gradcheck() -> None:
    model = critic()
    names, weights = zip(*model.named_parameters(), strict=True)

    def value(*values: Tensor) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

        return estimate(call, X, direction=U, sigma=0.1)

    assert torch.autograd.gradcheck(value, weights)


def test_scores_that_are_known_are_not_computed_again() -> None:
    model = critic()
    calls: list[Tensor] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return model(x)

    scores = model(X)
    found = estimate(counted, X, direction=U, scores=scores)
    assert len(calls) == 1
    expected = estimate(model, X, direction=U)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weights = list(model.parameters())
    ours, again = (torch.autograd.grad(value, weights) for value in (found, expected))
    torch.testing.assert_close(ours, again, rtol=1e-12, atol=1e-15)


def test_scores_of_patches_are_added_up() -> None:
    def patches(x: Tensor) -> Tensor:
        return x.square().view(4, 2, 3)

    found = estimate(patches, X, direction=U)
    torch.testing.assert_close(found, estimate(lambda x: patches(x).sum((1, 2)), X, direction=U))


def test_the_critic_computes_in_float32_under_autocast() -> None:
    model, dtypes = critic().float(), []
    model[0].register_forward_hook(lambda _m, _x, y: dtypes.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = estimate(model, X.float(), direction=U)
    assert dtypes == [torch.float32] * 2
    torch.testing.assert_close(found, estimate(model, X.float(), direction=U), rtol=0, atol=0)


def test_parameters_that_it_does_not_depend_on_get_zeros() -> None:
    model, other = critic(), nn.Parameter(torch.ones(3))
    (gradient,) = torch.autograd.grad(estimate(model, X, direction=U, zeros=[other]), [other])
    assert torch.equal(gradient, torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ({"direction": U[:2]}, r"direction must be \(4, 6\), as x, got shape \(2, 6\)"),
        ({"scores": torch.ones(3)}, r"critic must return \[4\] or \[4, 1\]"),
        ({"scores": torch.ones(4).half()}, "float32 or float64 scores for finite differences, got torch.float16"),
    ],
)
def test_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        estimate(critic(), X, **options)
    with pytest.raises(ValueError, match="method must be reverse, tangent or finite-difference, got 'other'"):
        zero_centered_penalty(critic(), X, method="other")
