"""What a piece is given: its device, what is done already, and where its rows go, each written at once."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Measure = Callable[[], dict[str, Any]]
DEVICE_BROKEN = 3
"""Exit code of a piece after a fault that has left the GPU unusable for its process."""


@dataclass
class Context:
    """One run of one piece.

    Attributes:
        rows: file of JSON lines, one for each measurement.
        rehearse: on the CPU, at tiny sizes, to find faults of the program and not of a GPU.
        done: labels of measurements that an earlier run has.
        faulted: labels of those that failed there: they come last, as they may end this process.
        faults: how many there were.
    """

    rows: Path
    rehearse: bool = False
    done: frozenset[str] = frozenset()
    faulted: frozenset[str] = frozenset()
    faults: int = field(default=0, init=False)
    _deferred: list[tuple[str, Measure]] = field(default_factory=list, init=False)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def row(self, label: str, values: dict[str, Any]) -> None:
        """Write one measurement; with "fault" among its values it is one that failed."""
        self.faults += "fault" in values
        with self.rows.open("a") as file:
            file.write(json.dumps({"label": label, **values}) + "\n")
        print(f"{label}: {', '.join(f'{name} {_short(value)}' for name, value in values.items())}", flush=True)

    def attempt(self, label: str, measure: Measure) -> None:
        """Write what `measure` returns, or its exception as a fault; not again what is done.

        Raises:
            SystemExit: the fault has left the GPU unusable for this process.
        """
        if label in self.done:
            return
        if label in self.faulted:
            self._deferred.append((label, measure))
            return
        self._measure(label, measure)

    def finish(self) -> None:
        """Take the measurements that failed in an earlier run."""
        for label, measure in self._deferred:
            self._measure(label, measure)

    def _measure(self, label: str, measure: Measure) -> None:
        began = time.monotonic()
        try:
            values = measure()
        except Exception as error:  # whatever a GPU that nobody has seen does
            self.row(label, {"fault": f"{type(error).__name__}: {str(error).strip()[:600]}"})
            self._require_device()
        else:
            self.row(label, {**values, "seconds": round(time.monotonic() - began, 2)})

    def _require_device(self) -> None:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.row("device", {"fault": f"unusable after the fault above: {str(error).splitlines()[0]}"})
                raise SystemExit(DEVICE_BROKEN) from None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_ms(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Milliseconds of one of `repeats` calls in a row, by events on a GPU: the slower of its device and its host."""
    synchronize(device)
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - began) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def host_ms(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median milliseconds until a call returns to Python, each begun with an idle device."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    synchronize(device)
    return statistics.median(times)


def profile(run: Callable[[], None], device: torch.device) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds on the device) of one call, the longest first; on a CPU its operations."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as found:
        run()
        synchronize(device)
    rows = [
        (it.key, it.count, it.self_device_time_total if on_gpu else it.self_cpu_time_total)
        for it in found.key_averages()
    ]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def replayed_us(run: Callable[[], None], device: torch.device, repeats: int = 20) -> float:
    """Microseconds of one call on the device, by replay of a graph: without the host."""
    for _ in range(3):
        run()
    if device.type == "cpu":
        return 1e3 * step_ms(run, device, 1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    graph.replay()
    return 1e3 * min(step_ms(graph.replay, device, repeats) for _ in range(3))
