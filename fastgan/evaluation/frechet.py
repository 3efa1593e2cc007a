"""Frechet distance between two sets of features, from means and covariances that are kept while features stream by."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Count, mean and scatter of feature vectors, in float64; memory does not grow with their number.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque (1979), which subtracts each batch's own mean
    first and so does not lose digits where features lie far from zero. Joining is the same whether batches follow one
    another or come from other ranks.

    Attributes:
        count: int; mean: float64 [D]; scatter: float64 [D, D], the sum of outer products of deviations from `mean`.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take in features [N, D] of any floating dtype, on any device."""
        if len(features) == 0:
            return
        features = features.to(device=self.mean.device, dtype=torch.float64)
        mean = features.mean(dim=0)
        deviations = features - mean
        self._join(len(features), mean, deviations.T @ deviations)

    def merge(self, other: Moments) -> None:
        """Take in what `other` has seen."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
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
            ValueError: fewer than two vectors were seen.
        """
        if self.count < 2:
            raise ValueError(f"count: was {self.count}; a covariance needs 2 or more")
        return self.scatter / (self.count - 1)

    def state(self) -> dict[str, Tensor]:
        """Tensors that `from_state` makes it from again."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        moments = cls(0)
        moments.count = int(state["count"])
        moments.mean, moments.scatter = state["mean"].clone(), state["scatter"].clone()
        return moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the root eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric and has the
    eigenvalues of C_a C_b: two symmetric eigenproblems, whose rounding cannot make them complex. Directions in which a
    covariance is singular have eigenvalue zero up to rounding, and negative ones are taken for that.

    Raises:
        ValueError: the sizes differ, or one has seen fewer than two vectors.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b must have {len(a.mean)}, as a, got {len(b.mean)} features")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * trace
    return ((a.mean - b.mean).square().sum() + spread).item()
