"""Measure several ways to compute the same thing in one run: errors first, then peak memory, then interleaved times.

    from benchmarks.side_by_side import compare

    @pytest.mark.benchmark(group="pixel_norm")
    def test_pixel_norm(benchmark):
        compare(benchmark, "f32 (16, 256, 64, 64)", {"cpp": f, "plain": g}, expected=h(), baseline="plain")

A side is a function without arguments that returns tensors; the first one is ours. Sides take turns, so that a machine
that slows down for a while slows all of them. No time is taken of a side whose results are wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Side = Callable[[], Any]
MB = 1e6


@dataclass
class Row:
    """Result of one comparison; times in seconds, memory in bytes, errors as relative RMS, one for each output."""

    group: str
    case: str
    baseline: str
    times: dict[str, float]
    memory: dict[str, int]
    errors: dict[str, list[float]]
    notes: dict[str, str] = field(default_factory=dict)


ROWS: list[Row] = []


def _tensors(value: Any) -> list[Tensor | None]:
    return list(value) if isinstance(value, Sequence) else [value]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`, in float64; inf where either has a NaN."""
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)} where {tuple(expected.shape)} is expected")
    scale = expected.square().mean().sqrt().item()
    error = (actual - expected).square().mean().sqrt().item() / (scale or 1.0)
    return error if error == error else float("inf")


def _errors(side: Side, expected: list[Tensor | None]) -> list[float]:
    outputs = _tensors(side())
    if len(outputs) != len(expected):
        raise ValueError(f"{len(outputs)} outputs where {len(expected)} are expected")
    pairs = zip(outputs, expected, strict=True)
    return [relative_error(a, e) for a, e in pairs if a is not None and e is not None]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident(key: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its high-water mark)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _resident_peak(side: Side) -> int:
    """How far resident memory rises above where it is, whoever allocates; 0 where the system does not tell."""
    try:
        # What malloc keeps after a free would be used again without showing.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        side()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return 0


def _allocated_peak(side: Side) -> int:
    """Largest sum of live allocations of torch's CPU allocator during one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        side()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_memory(side: Side, device: str | None = None) -> int:
    """Peak extra bytes of one call, results included: of the CUDA allocator, or of the process on a CPU.

    device: "cuda" or "cpu"; by default a GPU where there is one. On a CPU it is the larger of what torch's allocator
    handed out and of the rise in resident memory: the first misses scratch that a kernel takes elsewhere, the second
    memory that was resident already.
    """
    gc.collect()
    if torch.cuda.is_available() and device != "cpu":
        _synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(_resident_peak(side), _allocated_peak(side))


def _timed(side: Side) -> float:
    _synchronize()
    start = time.perf_counter()
    side()
    _synchronize()
    return time.perf_counter() - start


def interleaved(sides: dict[str, Side], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each side over `rounds` rounds in which every side runs once."""
    for _ in range(warmup):
        for side in sides.values():
            side()
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seen[name].append(_timed(side))
    return {name: statistics.median(times) for name, times in seen.items()}


def compare(
    benchmark: Any,
    case: str,
    sides: dict[str, Side],
    *,
    expected: Any,
    baseline: str,
    rounds: int = 30,
    floor: float | Sequence[float] = 1e-6,
    memory: bool = True,
) -> Row:
    """Check every side, then measure memory and times; pytest-benchmark times the first side, the others between.

    Args:
        benchmark: the fixture; `extra_info` gets errors, memory and the other sides' times, so JSON files hold all.
        case: shape, dtype, layout, mode.
        sides: name -> function without arguments; the first is ours.
        expected: what it should return, in float64; None for an output that is not compared.
        baseline: the side that others are compared with: an error may be twice its error, or `floor` if that is more
            (one for all outputs or one for each).
        rounds: how often each side runs.
        memory: measure peak extra memory.

    Raises:
        AssertionError: a side is wrong.
    """
    wanted = _tensors(expected)
    errors = {name: _errors(side, wanted) for name, side in sides.items()}
    floors = [floor] * len(errors[baseline]) if isinstance(floor, float) else list(floor)
    for name, found in errors.items():
        for at, error in enumerate(found):
            limit = max(2 * errors[baseline][at], floors[at])
            assert error <= limit, f"{case}: output {at} of {name} is wrong: error {error:.2g}, may be {limit:.2g}"
    peaks = {name: peak_memory(side) for name, side in sides.items()} if memory else {}

    ours, *others = sides
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()

    def between() -> None:
        for name in others:
            seen[name].append(_timed(sides[name]))
        _synchronize()

    def target() -> None:
        sides[ours]()
        _synchronize()

    benchmark.pedantic(target, setup=between, rounds=rounds, iterations=1, warmup_rounds=2)
    times = {name: statistics.median(found) for name, found in seen.items() if found}
    with contextlib.suppress(AttributeError):  # with --benchmark-disable there is no time
        times = {ours: benchmark.stats.stats.median, **times}
    row = Row(benchmark.group or "", case, baseline, times, peaks, errors)
    ROWS.append(row)
    benchmark.extra_info.update(
        case=case, baseline=baseline, median_seconds=times, peak_extra_bytes=peaks, relative_errors=errors
    )
    return row


def table() -> list[str]:
    """Lines of all comparisons so far, for people; under a group of several, the mean of how many times faster."""
    lines = []
    for group in dict.fromkeys(row.group for row in ROWS):
        lines.append(f"{group:43} {'side':12}{'ms':>10}{'times faster':>14}{'peak MB':>10}{'largest error':>15}")
        rows = [row for row in ROWS if row.group == group]
        for row in rows:
            for at, (name, seconds) in enumerate(row.times.items()):
                faster = f"{row.times[row.baseline] / seconds:.2f}" if row.baseline in row.times else ""
                peak = f"{row.memory[name] / MB:.1f}" if name in row.memory else ""
                error = f"{max(row.errors[name], default=0.0):.1e}"
                title = row.case if at == 0 else ""
                lines.append(f"  {title:42}{name:12}{seconds * 1e3:10.2f}{faster:>14}{peak:>10}{error:>15}")
        ratios: dict[str, list[float]] = {}
        for row in rows:
            for name, seconds in row.times.items():
                if name != row.baseline and row.baseline in row.times:
                    ratios.setdefault(name, []).append(row.times[row.baseline] / seconds)
        for name, found in ratios.items():
            if group and len(found) > 1:
                mean = statistics.geometric_mean(found)
                lines.append(f"  {'geometric mean':42}{name:12}{'':10}{mean:14.2f}   least {min(found):.2f}")
    return lines
