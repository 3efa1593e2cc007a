"""Metrics of two sets of features held in memory: kernel distance, precision and recall, density and coverage.

What torch-fidelity has is computed by it, on features given; density and coverage no kept library has.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUBSET = 1000  # vectors of each set in a subset of the kernel distance


def kernel_distance(generated: Tensor, real: Tensor, *, subsets: int = 100, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased squared MMD with kernel (x.y / D + 1)^3.

    Binkowski et al. 2018, by torch-fidelity. generated [N, D], real [M, D]. Subsets have min(1000, N, M) vectors, drawn
    without replacement from `seed`.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=subsets,
        kid_subset_size=min(SUBSET, len(generated), len(real)),
        rng_seed=seed,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), by torch-fidelity.

    Precision is the share of generated [N, D] that lie in the ball of a real one, recall that of real [M, D] in the
    ball of a generated one; a ball reaches to the k-th nearest neighbor in its own set. Blocks of distances are
    1,000 rows high.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return calculate_precision_recall_part(generated.double(), real.double(), neighborhood=k, batch_size=1000)


def density_coverage(generated: Tensor, real: Tensor, *, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, eqs. 3 and 5).

    With balls around each real vector that reach to its k-th nearest real neighbor: density is the mean over
    generated [N, D] of the number of balls it lies in, divided by k (1 is expected of the real distribution, more is
    possible); coverage is the share of balls of real [M, D] that hold a generated vector.

    Raises:
        ValueError: there are no k neighbors.
    """
    if len(real) <= k:
        raise ValueError(f"real: had {len(real)} vectors; {k + 1} or more have {k} neighbors")
    generated, real = generated.double(), real.double()
    inside = 0
    covered = 0
    for rows in real.split(1000):
        # A vector is its own nearest, at distance zero; the k-th neighbor is the (k + 1)-th smallest.
        radius = torch.cdist(rows, real).kthvalue(k + 1, dim=1).values
        hits = torch.cdist(rows, generated) <= radius[:, None]
        inside += int(hits.sum())
        covered += int(hits.any(dim=1).sum())
    return inside / (k * len(generated)), covered / len(real)
