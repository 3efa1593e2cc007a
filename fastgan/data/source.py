"""A set of images that can be read one by one, at any resolution up to the target: what every `--data` is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastgan.data.images import area_average
from fastgan.errors import ArgumentError


class Encoded(NamedTuple):
    """The image files of a source as they are, for decoders other than Pillow.

    read: a whole file, by index; safe from several threads. name: what to call it in an error. side: the center
    square of an image is to be brought to side x side, and area-averaged from there; exact: every image is so already.
    kinds: format, mode and transparency as in `images.Checked`, of all files, with the name of one that is so.
    """

    read: Callable[[int], bytes]
    name: Callable[[int], str]
    side: int
    kinds: dict[tuple[str, str, bool], str]
    exact: bool = False


class Source(ABC):
    """A fixed set of images.

    `name`: the kind, as in `--data`; `path`: where it lies, or None. `channels`, `resolution` (the target,
    px). `labels`: int64 [N] or None; `num_classes`: 0 without labels. `fingerprint`: 16 hex digits that
    change when the data does, whatever folder it lies in. `skipped`: (file, reason) for files that are no
    images. Reading is safe from several threads.
    """

    def __init__(
        self,
        name: str,
        *,
        resolution: int,
        channels: int,
        labels: np.ndarray | None,
        num_classes: int,
        fingerprint: str,
        path: Path | None = None,
        skipped: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.path = path
        self.channels = channels
        self.resolution = resolution
        self.labels = labels
        self.num_classes = num_classes
        self.fingerprint = fingerprint
        self.skipped = list(skipped)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _target(self, index: int) -> np.ndarray:
        """One image at the target resolution: uint8 [C, resolution, resolution]."""

    def read(self, index: int, resolution: int) -> np.ndarray:
        """One image: uint8 [C, resolution, resolution], area-averaged from the target size.

        Raises: ArgumentError if `resolution` is no power of two from 4 to the target, or the file cannot be
        decoded; IndexError if `index` is outside [0, N).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        self.check_resolution(resolution)
        return area_average(self._target(index), resolution)

    def arrays(self, resolution: int) -> list[np.ndarray] | None:
        """What lies decoded on the disk: memory-mapped uint8 [n, C, resolution, resolution], in order; None: nothing.

        Raises: ArgumentError naming a file that is not what it should be.
        """
        return None

    def encoded(self, resolution: int) -> Encoded | None:
        """The image files from which images of `resolution` are made; None if there are no such files."""
        return None

    def check_resolution(self, resolution: int) -> None:
        """Raises: ArgumentError if images cannot be read at `resolution`."""
        if not is_resolution(resolution) or resolution > self.resolution:
            may_be = f"must be a power of two from 4 to {self.resolution}"
            raise ArgumentError("--resolution", resolution, may_be)


def is_resolution(resolution: int) -> bool:
    return resolution >= 4 and resolution & (resolution - 1) == 0
