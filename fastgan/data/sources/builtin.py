"""Sources without files: scikit-learn's digits, stacks of them, and synthetic images."""

from __future__ import annotations

import hashlib

import numpy as np

from fastgan.data.source_types import ArraySource, Source, import_for, require_channels
from fastgan.errors import ArgumentError

BUILTIN = ("digits", "stacked-digits", "synthetic")


def open_builtin(spec: str, resolution: int, channels: int | None, seed: int) -> Source:
    """Open one of `BUILTIN`; the parameters are those of `open_source`."""
    if spec == "synthetic":
        return _synthetic(resolution, channels, seed)
    if spec == "digits":
        return _digits(spec, resolution, channels)
    require_channels(spec, 3, channels)
    return _StackedDigits(_digits(spec, resolution, None), seed)


def _digits(spec: str, resolution: int, channels: int | None) -> Source:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 images of 8 x 8 with values 0 to 16."""
    require_channels("digits", 1, channels)
    digits = import_for(spec, "sklearn.datasets", "scikit-learn").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return ArraySource("digits", images, digits.target.astype(np.int64), resolution)


class _StackedDigits(Source):
    """60,000 images, each with three digits as its channels: 1,000 modes, which are the labels (Metz et al. 2017).

    The three digits of an image depend on (seed, index) alone.
    """

    def __init__(self, digits: Source, seed: int) -> None:
        count = 60_000
        words = np.random.Philox(key=np.array([seed % 2**64, 1], dtype=np.uint64)).random_raw(3 * count)
        self._digits = np.stack([digits.read(i, digits.resolution) for i in range(len(digits))])[:, 0]
        self._chosen = (words % len(digits)).astype(np.int64).reshape(count, 3)
        assert digits.labels is not None
        super().__init__(
            "stacked-digits",
            resolution=digits.resolution,
            channels=3,
            labels=digits.labels[self._chosen] @ np.array([100, 10, 1]),
            num_classes=1000,
            fingerprint=hashlib.sha256(f"stacked {seed} {digits.fingerprint}".encode()).hexdigest()[:16],
        )

    def __len__(self) -> int:
        return len(self._chosen)

    def _target(self, index: int) -> np.ndarray:
        return self._digits[self._chosen[index]]


def _synthetic(resolution: int, channels: int | None, seed: int) -> Source:
    """2,048 smooth random images for speed measurements: 8 x 8 noise, enlarged when read; labels cycle 0 to 9."""
    channels = 3 if channels is None else channels
    if channels < 1:
        raise ArgumentError("--channels", channels, "must be at least 1")
    words = np.random.Philox(key=np.array([seed % 2**64, 0], dtype=np.uint64)).random_raw(2048 * channels * 8)
    images = words.astype("<u8").view(np.uint8).reshape(2048, channels, 8, 8)
    return ArraySource("synthetic", images, np.arange(2048, dtype=np.int64) % 10, resolution)
