from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from fastgan.evaluation.classes import ClassScore, ModeCounts
from fastgan.evaluation.statistic import Sums


def reloaded(stored: Sums, empty: Any) -> Any:
    empty.load_state(stored.state())
    return empty


def test_inception_score_equals_torch_fidelity() -> None:
    """torch-fidelity splits the set into runs; here a part has the images with the same index mod 10."""
    logits = 3 * torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    score, other = ClassScore(), ClassScore()
    for i, part in enumerate(torch.arange(500).split(33)):
        (score if i % 2 else other).update(part, logits[part])
    score.merge(reloaded(other, ClassScore()))
    runs = logits.view(50, 10, 12).transpose(0, 1).reshape(500, 12)
    theirs = isc_features_to_metric(runs, splits=10, shuffle=False)
    assert score.result() == pytest.approx((theirs[KEY_METRIC_ISC_MEAN], theirs[KEY_METRIC_ISC_STD]), rel=1e-10)


def test_inception_score_is_one_for_one_class_and_four_for_four() -> None:
    sure = torch.eye(4).repeat(20, 1) * 1000
    score = ClassScore()
    score.update(torch.arange(80) // 4, sure)
    assert score.result()[0] == pytest.approx(4)
    score = ClassScore()
    score.update(torch.arange(3), sure[:1].expand(3, 4))  # fewer images than parts
    assert score.result() == pytest.approx((1, 0))


def probabilities(classes: list[tuple[int, ...]], top: float) -> torch.Tensor:
    p = torch.full((len(classes), len(classes[0]), 10), (1 - top) / 9)
    for i, triple in enumerate(classes):
        for channel, digit in enumerate(triple):
            p[i, channel, digit] = top
    return p


def test_a_mode_counts_if_all_three_channels_are_confident() -> None:
    counts = ModeCounts(10, 3)
    counts.update(probabilities([(0, 0, 7), (9, 9, 9)], top=0.95))
    unsure = probabilities([(1, 2, 3)], top=0.95)
    unsure[0, 1] = probabilities([(2,)], top=0.89)[0, 0]
    other = ModeCounts(10, 3)
    other.update(unsure)
    other.update(probabilities([(0, 0, 7)], top=0.95))
    counts.merge(reloaded(other, ModeCounts(10, 3)))
    assert counts.counts.nonzero().flatten().tolist() == [7, 123, 999] and counts.counts[7] == 2
    uniform = torch.full((1000,), 1e-3)
    result = counts.result(uniform)
    assert result["modes"] == 2 and result["confident"] == 0.75
    direct = 0.5 * math.log(500) + 2 * 0.25 * math.log(250)
    assert result["kl"] == pytest.approx(direct, rel=1e-6)


def test_modes_at_exactly_the_limit_and_kl_of_the_expected_distribution() -> None:
    counts = ModeCounts(10, 1)
    counts.update(probabilities([(d,) for d in range(10)], top=0.9))
    assert counts.result(torch.full((10,), 0.1)) == pytest.approx({"modes": 10, "confident": 1.0, "kl": 0.0}, abs=1e-7)
    skewed = torch.tensor(np.arange(1, 11) / 55)
    assert counts.result(skewed)["kl"] == pytest.approx(sum(0.1 * math.log(0.1 / p) for p in skewed.tolist()))
