from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgan.evaluation.neighbors import density_coverage, kernel_distance, precision_recall


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def distances(a: Tensor, b: Tensor) -> np.ndarray:
    return np.sqrt(((a.double().numpy()[:, None] - b.double().numpy()[None]) ** 2).sum(-1))


def radii(x: Tensor, k: int) -> np.ndarray:
    return np.sort(distances(x, x), axis=1)[:, k]


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    """With as many vectors as a subset has, every subset is the whole set."""
    x, y = normal(60, 8, 0), normal(60, 8, 1, shift=0.5)

    def kernel(a: Tensor, b: Tensor) -> np.ndarray:
        return (a.double().numpy() @ b.double().numpy().T / 8 + 1) ** 3

    def off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    direct = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    mean, deviation = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(direct, rel=1e-9) and deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_has_100_subsets_of_at_most_1000() -> None:
    x, y = normal(60, 2, 0), normal(40, 2, 1)
    assert kernel_distance(x, y) == kernel_distance(x, y, subsets=100) != kernel_distance(x, y, subsets=10)
    assert kernel_distance(y, x, subsets=10)[1] > 0
    x, y = normal(1000, 2, 2), normal(1000, 2, 3)  # whole in every subset
    assert kernel_distance(x, y, subsets=2)[1] == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_one_distribution_is_about_zero_and_reproducible() -> None:
    x, y = normal(1500, 4, 2), normal(1300, 4, 3)
    mean, deviation = kernel_distance(x, y, subsets=20)
    assert abs(mean) < 3 * deviation
    assert kernel_distance(x, y, subsets=20) == (mean, deviation) != kernel_distance(x, y, subsets=20, seed=1)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_precision_and_recall(shift: float) -> None:
    fake, real = normal(150, 3, 4, shift), normal(120, 3, 5)
    precision = (distances(fake, real) <= radii(real, 3)).any(1).mean()
    recall = (distances(real, fake) <= radii(fake, 3)).any(1).mean()
    assert precision_recall(fake, real) == pytest.approx((precision, recall))
    assert 0.1 < recall < 1


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_density_and_coverage(shift: float) -> None:
    fake, real = normal(150, 3, 6, shift), normal(1120, 3, 7)  # more than one block of real ones
    inside = distances(fake, real) <= radii(real, 5)
    density, coverage = density_coverage(fake, real)
    assert density == pytest.approx(inside.sum() / (5 * 150))
    assert coverage == pytest.approx(inside.any(0).mean())
    assert 0 < coverage < 1


def test_balls_include_their_boundary() -> None:
    """Whole numbers on a line: the fifth neighbor of 0 is at 5, and so is an image that was generated there."""
    real = torch.arange(6.0)[:, None]
    density, coverage = density_coverage(torch.tensor([[-5.0], [99.0]]), real)
    assert density == pytest.approx(1 / (5 * 2)) and coverage == pytest.approx(1 / 6)
    same = torch.zeros(7, 2)
    assert density_coverage(same[:3], same) == pytest.approx((7 / 5, 1))


def test_density_far_from_zero() -> None:
    """float32 would round the distances away."""
    fake, real = ((x * 2**10).round() / 2**10 for x in (normal(60, 3, 9), normal(70, 3, 10)))
    near = density_coverage(fake, real)
    assert density_coverage(fake + 2**12, real + 2**12) == pytest.approx(near, abs=1e-12)


def test_copies_of_few_images_are_precise_and_cover_little() -> None:
    real = normal(200, 4, 8)
    fake = real[:5].repeat(40, 1)
    assert precision_recall(fake, real)[0] == 1.0
    assert precision_recall(fake, real)[1] < 0.1
    assert density_coverage(fake, real)[1] < 0.3


def test_density_needs_enough_vectors() -> None:
    with pytest.raises(ValueError, match="real must have at least 6 vectors for 5 neighbors, got 5"):
        density_coverage(normal(9, 2, 0), normal(5, 2, 0))
