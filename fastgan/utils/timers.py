"""Time that a device spends, read when reading costs nothing: events on a GPU, where asking for the time would wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Marks:
    """Moments of a device's work, in order; `seconds` waits for the later one."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __call__(self) -> int:
        """The number of the moment that is now."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def seconds(self, a: int, b: int) -> float:
        if not self._cuda:
            return float(self._marks[b] - self._marks[a])
        self._marks[b].synchronize()
        return float(self._marks[a].elapsed_time(self._marks[b])) / 1000

    def clear(self) -> None:
        self._marks.clear()


class Stopwatch:
    """Sum of spans; `read` gives it and starts again, and waits for the device's last span.

    A span inside another adds nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._marks = Marks(device)
        self._spans: list[tuple[int, int]] = []
        self._running = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self._running:
            yield
            return
        begun = self._marks()
        self._running = True
        try:
            yield
        finally:
            self._running = False
            self._spans.append((begun, self._marks()))

    def read(self) -> float:
        total = sum(self._marks.seconds(a, b) for a, b in self._spans)
        self._spans.clear()
        self._marks.clear()
        return total
