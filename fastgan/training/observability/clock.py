"""The time that training takes between two rows of metrics.jsonl."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Lap(NamedTuple):
    """From one row to the next.

    Attributes:
        start: images seen at its start.
        seconds: that training took, waiting for data included.
        excluded: seconds of samples, evaluations, checkpoints and compiling, which are not in `seconds`.
    """

    start: int
    seconds: float
    excluded: float


class TrainingClock:
    """Counts training's seconds apart from those of everything else that a run does."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, images: int) -> None:
        """Begin a lap."""
        self._began, self._images, self._excluded = time.monotonic(), images, 0.0

    def exclude(self, seconds: float) -> None:
        """Count `seconds` as not spent on training."""
        self._excluded += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count what is done inside as not spent on training."""
        began = time.monotonic()
        yield
        self.exclude(time.monotonic() - began)

    def lap(self, images: int) -> Lap:
        """End a lap and begin the next one."""
        lap = Lap(self._images, max(time.monotonic() - self._began - self._excluded, 1e-9), self._excluded)
        self.start(images)
        return lap
