from __future__ import annotations

import math

import pytest
import torch

from fastgan.evaluation.sliced_wasserstein import sliced_wasserstein


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_in_any_order() -> None:
    x = random(50, 3, 4, 4)
    assert sliced_wasserstein(x, x) == 0.0
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert sliced_wasserstein(x, x[order]) == pytest.approx(0.0, abs=1e-6)


def test_one_dimension_is_the_wasserstein_distance() -> None:
    a, b = torch.tensor([[0.0], [10.0], [3.0]]), torch.tensor([[4.0], [1.0], [12.0]])
    assert sliced_wasserstein(a, b) == pytest.approx((1 + 1 + 2) / 3)


@pytest.mark.parametrize("dimension", [2, 12])
def test_a_shift(dimension: int) -> None:
    """The mean over directions u of |u . v| is |v| gamma(d/2) / (sqrt(pi) gamma((d+1)/2))."""
    x = random(30, dimension)
    shift = random(dimension, seed=1)
    expected = shift.norm().item() * math.gamma(dimension / 2) / (math.sqrt(math.pi) * math.gamma((dimension + 1) / 2))
    distance = sliced_wasserstein(x, x + shift, projections=20_000)
    assert distance == pytest.approx(expected, rel=0.03)
    assert sliced_wasserstein(x, x + 3 * shift) == pytest.approx(3 * sliced_wasserstein(x, x + shift), rel=1e-4)


def test_symmetric_and_reproducible() -> None:
    a, b = random(40, 6), random(40, 6, seed=1) * 2
    assert sliced_wasserstein(a, b) == sliced_wasserstein(b, a) == sliced_wasserstein(a, b) > 0.1
    assert sliced_wasserstein(a, b, seed=1) != sliced_wasserstein(a, b, seed=2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sliced_wasserstein(a, b)
    assert torch.equal(torch.get_rng_state(), state)


def test_further_apart_is_larger() -> None:
    a = random(200, 8)
    distances = [sliced_wasserstein(a, random(200, 8, seed=1) * scale) for scale in (1.0, 2.0, 4.0)]
    assert distances == sorted(distances) and distances[0] < 0.3 * distances[2]


def test_images_are_flattened_and_any_dtype_is_taken() -> None:
    a, b = random(10, 3, 2, 2), random(10, 3, 2, 2, seed=1)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a.flatten(1), b.flatten(1))
    assert sliced_wasserstein(a.double(), b.double()) == pytest.approx(sliced_wasserstein(a, b), rel=1e-6)


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"b: had shape \(3, 2\); it may be \(4, 2\), as a"):
        sliced_wasserstein(torch.zeros(4, 2), torch.zeros(3, 2))
