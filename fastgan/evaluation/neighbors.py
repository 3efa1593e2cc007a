"""Metrics of two sets of features in memory: kernel distance, precision and recall, density and coverage, memorizing.

torch-fidelity computes the first three from given features. No maintained library has the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUBSET = 1000  # vectors of each set in a subset of the kernel distance


def kernel_distance(generated: Tensor, real: Tensor, *, subsets: int = 100, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased squared MMD with kernel (x.y / D + 1)^3.

    Binkowski et al. 2018, by torch-fidelity.

    Args:
        generated: features [N, D].
        real: features [M, D].
        subsets: number of subsets, of min(1000, N, M) vectors each, drawn without replacement.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    result = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=subsets,
        kid_subset_size=min(SUBSET, len(generated), len(real)),
        rng_seed=seed,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), by torch-fidelity.

    Each vector has a ball that reaches to its k-th nearest neighbor in its own set. Precision is the share of generated
    vectors [N, D] in a ball of a real one, recall the share of real vectors [M, D] in a ball of a generated one.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return calculate_precision_recall_part(generated.double(), real.double(), neighborhood=k, batch_size=1000)


def density_coverage(generated: Tensor, real: Tensor, *, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, eqs. 3 and 5).

    Each real vector has a ball that reaches to its k-th nearest real neighbor. Density is the number of balls in which
    a generated vector lies, averaged over generated [N, D] and divided by k: its expectation for the real distribution
    is 1, and larger values are possible. Coverage is the share of the balls of real [M, D] with a generated vector.

    Raises:
        ValueError: there are k or fewer real vectors.
    """
    if len(real) <= k:
        raise ValueError(f"real must have at least {k + 1} vectors for {k} neighbors, got {len(real)}")
    generated, real = generated.double(), real.double()
    inside = 0
    covered = 0
    for rows in real.split(1000):
        # The smallest distance is a vector's own, zero: the k-th neighbor has the (k + 1)-th smallest.
        radius = torch.cdist(rows, real).kthvalue(k + 1, dim=1).values
        hits = torch.cdist(rows, generated) <= radius[:, None]
        inside += int(hits.sum())
        covered += int(hits.any(dim=1).sum())
    return inside / (k * len(generated)), covered / len(real)


def nearest_real(generated: Tensor, real: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest real vectors of each generated one.

    Args:
        generated: features [N, D].
        real: features [M, D], M >= k.

    Returns:
        Distances, float64 [N, k], and indices of real vectors, int64 [N, k], nearest first.
    """
    real = real.double()
    found = [torch.cdist(rows.double(), real).topk(k, dim=1, largest=False) for rows in generated.split(1000)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def own_distances(real: Tensor) -> Tensor:
    """Distance of each real vector [M, D] to its nearest other one, float64 [M]; M >= 2."""
    real = real.double()
    # The smallest distance is a vector's own, zero.
    return torch.cat([torch.cdist(rows, real).kthvalue(2, dim=1).values for rows in real.split(1000)])


def memorized_share(generated: Tensor, real: Tensor) -> float:
    """Share of generated vectors [N, D] that are nearer to their nearest real one than that is to any other real one.

    One minus the authenticity of Alaa et al. 2022 (section 3.3). It is not 0 for images that are new: those of a second
    set of the same kind have some share too, and copies have 1. It compares with all of real [M, D], and with a part of
    the training images it sees copies of that part alone.
    """
    distance, index = nearest_real(generated, real)
    return float((distance[:, 0] < own_distances(real)[index[:, 0]]).double().mean())
