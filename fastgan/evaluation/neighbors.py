"""Metrics of two sets of features in memory: kernel distance, precision and recall, density and coverage.

torch-fidelity computes the first three from given features. No maintained library has density and coverage.
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
