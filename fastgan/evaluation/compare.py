"""Metrics from the statistics of generated and of real images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.data import Source
from fastgan.evaluation import neighbors
from fastgan.evaluation.classes import ClassScore
from fastgan.evaluation.collect import ImageStatistics
from fastgan.evaluation.frechet import Moments, frechet_distance
from fastgan.evaluation.sliced_wasserstein import Patches, patch_distances

Warn = Callable[[str], None]


def compare(
    generated: ImageStatistics,
    real: ImageStatistics,
    source: Source,
    metrics: Collection[str],
    seed: int,
    warn: Warn,
) -> dict[str, Any]:
    """{"metrics": {name: value}, "images": {name: number of images used}}; arguments as for `Evaluation`."""
    values: dict[str, Any] = {}
    used: dict[str, Any] = {"generated": generated.count, "real": len(source)}
    if generated.moments is not None and real.moments is not None:
        values |= _frechet_distance(generated.moments, real.moments, warn)
    if generated.rows is not None and real.rows is not None:
        generated_rows, real_rows = generated.rows.rows(), real.rows.rows()
        used["neighbors"] = min(len(generated_rows), len(real_rows))
        if "kid" in metrics:
            values |= _kernel_distance(generated_rows, real_rows, seed, warn)
        if "prdc" in metrics:
            values |= _neighbor_metrics(generated_rows, real_rows)
            values["memorized"] = neighbors.memorized_share(generated_rows, real_rows)
    if generated.score is not None:
        values |= _class_score(generated.score, generated.count, warn)
    if generated.patches is not None and real.patches is not None:
        values |= _patch_distances(generated.patches, real.patches, seed)
        used["swd"] = generated.patches.limit
    if generated.similarity is not None and real.similarity is not None:
        values |= {"ms_ssim": generated.similarity.result(), "ms_ssim_real": real.similarity.result()}
        used["ms_ssim_pairs"] = int(generated.similarity.count)
    if generated.modes is not None:
        expected = expected_modes(source)
        values |= {**generated.modes.result(expected), "modes_of": len(expected)}
    return {"metrics": values, "images": used}


def _frechet_distance(generated: Moments, real: Moments, warn: Warn) -> dict[str, float]:
    for moments, name in ((real, "real"), (generated, "generated")):
        if moments.count <= len(moments.mean):
            warn(
                f"fid: {moments.count:,} {name} images for {len(moments.mean):,} features: their covariance is "
                "singular, and the distance is biased upwards"
            )
    return {"frechet_distance": frechet_distance(generated, real)}


def _kernel_distance(generated: Tensor, real: Tensor, seed: int, warn: Warn) -> dict[str, float]:
    for rows, name in ((real, "real"), (generated, "generated")):
        if len(rows) == min(neighbors.SUBSET, len(generated), len(real)):
            warn(
                f"kid: every subset holds all {len(rows):,} {name} images, so the deviation over subsets does not show "
                f"how they vary: use more than {neighbors.SUBSET:,} of each"
            )
    mean, deviation = neighbors.kernel_distance(generated, real, seed=seed)
    return {"kernel_distance": mean, "kernel_distance_std": deviation}


def _neighbor_metrics(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage. They depend on the size of each set: both are cut to the smaller one."""
    size = min(len(generated), len(real))
    pair = generated[:size], real[:size]
    values = (*neighbors.precision_recall(*pair), *neighbors.density_coverage(*pair))
    return dict(zip(("precision", "recall", "density", "coverage"), values, strict=True))


def _class_score(score: ClassScore, n: int, warn: Warn) -> dict[str, float]:
    classes, part = score.probability.shape[1], n // score.PARTS
    if part < classes:
        warn(
            f"is: {n:,} generated images, {part:,} in a tenth, for {classes:,} classes: the score is biased downwards, "
            "because a tenth cannot contain all classes"
        )
    mean, deviation = score.result()
    return {"class_score": mean, "class_score_std": deviation}


def _patch_distances(generated: Patches, real: Patches, seed: int) -> dict[str, float]:
    """The mean over the levels of the pyramid, and each level; level 0 has the images' resolution."""
    distances = patch_distances(generated.levels(), real.levels(), seed)
    mean = sum(distances.values()) / len(distances)
    return {"swd": mean, **{f"swd_level{i}": distance for i, distance in distances.items()}}


def expected_modes(source: Source) -> Tensor:
    """Probability of each mode of digits, float64 [10^C]: the product over channels of each digit's frequency."""
    assert source.labels is not None
    expected = torch.ones(1, dtype=torch.float64)
    for channel in range(source.channels):
        digit = source.labels // 10 ** (source.channels - 1 - channel) % 10
        frequency = torch.from_numpy(np.bincount(digit, minlength=10) / len(digit))
        expected = (expected[:, None] * frequency).flatten()
    return expected
