"""Timers of a device's work that do not synchronize until they are read: CUDA events on a GPU, else the clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Marks:
    """Points in a device's stream of work, numbered from 0."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __call__(self) -> int:
        """Record a point; returns its number."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def seconds(self, a: int, b: int) -> float:
        """Seconds from point `a` to point `b`; waits for the device to reach `b`."""
        if not self._cuda:
            return float(self._marks[b] - self._marks[a])
        self._marks[b].synchronize()
        return float(self._marks[a].elapsed_time(self._marks[b])) / 1000

    def clear(self) -> None:
        """Forget all points."""
        self._marks.clear()


class Stopwatch:
    """Sums the time spent in its context. A context inside another one adds nothing."""

    def __init__(self, device: torch.device) -> None:
        self._marks = Marks(device)
        self._spans: list[tuple[int, int]] = []
        self._running = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self._running:
            yield
            return
        start = self._marks()
        self._running = True
        try:
            yield
        finally:
            self._running = False
            self._spans.append((start, self._marks()))

    def read(self) -> float:
        """Seconds since the last call; waits for the device to reach the last span's end."""
        total = sum(self._marks.seconds(a, b) for a, b in self._spans)
        self._spans.clear()
        self._marks.clear()
        return total
