from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgan.data import open_source
from fastgan.evaluation.digits import DigitReport, _resize, classifier, report


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, np.ndarray]:
    source = open_source("digits", 16)
    assert source.labels is not None
    pixels = np.stack([source.read(i, 16) for i in range(0, len(source), 4)])
    return torch.from_numpy(pixels).float() / 127.5 - 1, source.labels[::4]


def test_classifier_is_accurate_and_does_not_change_the_random_state() -> None:
    classifier.cache_clear()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    with torch.no_grad():  # as in `report`
        network, accuracy = classifier()
    assert 0.97 <= accuracy < 1  # 1 would mean that it was trained on these
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert classifier()[0] is network  # trained once


def test_real_digits(real: tuple[Tensor, np.ndarray]) -> None:
    images, labels = real
    result = report(images)
    assert sum(result.counts) == len(images) and len(result.counts) == 10
    assert result.confident > 0.9
    truth = np.bincount(labels, minlength=10)
    assert np.abs(truth - result.counts).sum() <= 0.04 * len(images)
    assert min(result.counts) > 0
    assert str(result).startswith("10 of 10 digits, 9")


@pytest.mark.parametrize("digit", [0, 7])
def test_one_digit(real: tuple[Tensor, np.ndarray], digit: int) -> None:
    images, labels = real
    result = report(images[labels == digit])
    assert result.counts[digit] >= 0.95 * (labels == digit).sum() and len(result.counts) == 10


def test_other_sizes_and_channels(real: tuple[Tensor, np.ndarray]) -> None:
    images, _ = real
    expected = report(images).counts
    large = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear").expand(-1, 3, -1, -1)
    assert report(images.expand(-1, 3, -1, -1)) == report(images)
    result = report(large)
    assert sum(abs(a - b) for a, b in zip(result.counts, expected, strict=True)) <= 0.04 * len(images)


def test_large_images_are_averaged_not_sampled() -> None:
    lines = torch.zeros(1, 1, 64, 64)
    lines[:, :, ::4] = 1  # one line of four; nearest-neighbor sampling would miss them
    assert _resize(lines)[0, 0, 1:-1] == pytest.approx(torch.full((14, 16), 0.25), abs=0.05)


def test_training_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash of its weights is in the name of the cache file of real images' statistics."""
    first: list[Tensor] = []

    class Stop(Exception):
        pass

    def stop(logits: Tensor, labels: Tensor) -> Tensor:
        first.append(logits.detach())
        raise Stop

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", stop)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.raises(Stop):
            classifier.__wrapped__()
    assert torch.equal(first[0], first[1])


def test_noise_is_not_classified_as_all_digits_with_confidence() -> None:
    images = torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = report(images)
    assert result.confident < 0.9 or max(result.counts) > 200


def test_report_as_text() -> None:
    assert str(DigitReport([5, 0, 1, 0, 0, 0, 0, 0, 0, 2], 0.875)) == (
        "3 of 10 digits, 87.5% confident, counts [5, 0, 1, 0, 0, 0, 0, 0, 0, 2]"
    )
