"""Frechet distance between two sets of features, from a streaming mean and covariance."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastgan.evaluation.statistic import Sums


class Moments(Sums):
    """Count, mean and scatter of feature vectors, in float64; memory does not grow with their number.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979). It subtracts the mean of each batch
    first, so that features far from zero lose no digits. Batches of one rank and results of several ranks are merged
    in the same way.

    Attributes:
        count: number of vectors.
        mean: float64 [D].
        scatter: sum of outer products of deviations from `mean`, float64 [D, D].
    """

    FIELDS: ClassVar = {"count": "count", "mean": "mean", "scatter": "scatter"}

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [N, D] of any floating dtype, on any device."""
        if len(features) == 0:
            return
        features = features.to(device=self.mean.device, dtype=torch.float64)
        mean = features.mean(dim=0)
        deviations = features - mean
        self._add(len(features), mean, deviations.T @ deviations)

    def merge(self, other: Moments) -> None:
        """Add the vectors of `other`."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [D, D].

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"count must be at least 2 for a covariance, got {self.count}")
        return self.scatter / (self.count - 1)

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.count = int(self.count)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is
    symmetric and has the eigenvalues of C_a C_b. Two symmetric eigenproblems give it, whose results are real whatever
    the rounding. A singular covariance has eigenvalues that rounding makes negative: they count as zero.

    Raises:
        ValueError: the numbers of features differ, or one of the two has fewer than two vectors.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b must have {len(a.mean)} features, as a has, got {len(b.mean)}")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * trace
    return ((a.mean - b.mean).square().sum() + spread).item()
