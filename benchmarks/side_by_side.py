"""Compare implementations ("sides") of one computation in one run: errors, then peak memory, then interleaved times.

    from benchmarks.side_by_side import compare

    @pytest.mark.benchmark(group="pixel_norm")
    def test_pixel_norm(benchmark):
        compare(benchmark, "f32 (16, 256, 64, 64)", {"cpp": f, "plain": g}, expected=h(), baseline="plain")

A side is a function without arguments that returns tensors; the first one is ours. Sides run in turns, so that a
temporary slowdown of the machine affects all of them. If the results of a side are wrong, nothing is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Side = Callable[[], Any]
MB = 1e6


@dataclass
class Row:
    """Result of one comparison.

    Attributes:
        group: heading in the summary.
        case: shape, dtype, layout, mode.
        baseline: the side that others are compared with.
        times: median seconds of each side; on a GPU those of the device, by events.
        host: on a GPU, median seconds until a call of each side returns to Python.
        memory: peak extra bytes of each side.
        errors: relative RMS error of each output of each side.
    """

    group: str
    case: str
    baseline: str
    times: dict[str, float]
    memory: dict[str, int]
    host: dict[str, float]
    errors: dict[str, list[float]]


ROWS: list[Row] = []


def _tensors(value: Any) -> list[Tensor | None]:
    return list(value) if isinstance(value, Sequence) else [value]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference divided by that of `expected`, in float64; infinite for a NaN."""
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    if actual.shape != expected.shape:
        raise ValueError(f"shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}")
    scale = expected.square().mean().sqrt().item()
    error = (actual - expected).square().mean().sqrt().item() / (scale or 1.0)
    return error if error == error else float("inf")


def _errors(side: Side, expected: list[Tensor | None]) -> list[float]:
    outputs = _tensors(side())
    if len(outputs) != len(expected):
        raise ValueError(f"number of outputs must be {len(expected)}, got {len(outputs)}")
    pairs = zip(outputs, expected, strict=True)
    return [relative_error(a, e) for a, e in pairs if a is not None and e is not None]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident(key: str) -> int:
    """Bytes of VmRSS (resident memory) or VmHWM (its maximum)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _resident_peak(side: Side) -> int:
    """Rise of resident memory, whichever allocator is used; 0 if the system does not report it."""
    try:
        # Memory that malloc keeps after a free would be reused without a rise.
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

    On a CPU this is the maximum of two measures: live allocations of torch's allocator, which miss scratch from other
    allocators, and the rise in resident memory, which misses memory that was resident before.

    Args:
        side: the call.
        device: "cuda" or "cpu"; default: a GPU if there is one.
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


def _timed(side: Side) -> tuple[float, float]:
    """Seconds of one call: on a GPU between two events, else by the clock; and until it returned to Python.

    A clock around a call and a synchronization would measure Python at small sizes.
    """
    _synchronize()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        side()
        return (seconds := time.perf_counter() - start), seconds
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start = time.perf_counter()
    begin.record()
    side()
    end.record()
    host = time.perf_counter() - start
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host


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
    """Check every side, then measure memory and times. pytest-benchmark times the first side, we time the others.

    Args:
        benchmark: the fixture. Its `extra_info`, and so its JSON file, gets errors, memory and all times.
        case: shape, dtype, layout, mode.
        sides: name -> function without arguments; the first is ours.
        expected: the exact outputs, in float64; None for an output that is not compared.
        baseline: the side that others are compared with. Errors may be twice its error.
        rounds: number of timed calls of each side.
        floor: relative errors up to this are accepted; one number, or one for each output.
        memory: whether to measure peak extra memory.

    Raises:
        AssertionError: The results of a side are wrong.
    """
    exact = _tensors(expected)
    errors = {name: _errors(side, exact) for name, side in sides.items()}
    floors = [floor] * len(errors[baseline]) if isinstance(floor, float) else list(floor)
    for name, of_side in errors.items():
        for at, error in enumerate(of_side):
            limit = max(2 * errors[baseline][at], floors[at])
            message = f"{case}: the error of output {at} of {name} must be at most {limit:.2g}, got {error:.2g}"
            assert error <= limit, message
    peaks = {name: peak_memory(side) for name, side in sides.items()} if memory else {}

    ours, *others = sides
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for side in sides.values():
        side()

    def time_others() -> None:
        for name in others:
            samples[name].append(_timed(sides[name]))
        if torch.cuda.is_available():  # pytest-benchmark's clock cannot tell device from host
            samples[ours].append(_timed(sides[ours]))
        _synchronize()

    def target() -> None:
        sides[ours]()
        _synchronize()

    benchmark.pedantic(target, setup=time_others, rounds=rounds, iterations=1, warmup_rounds=2)
    times = {name: statistics.median(seconds for seconds, _ in values) for name, values in samples.items() if values}
    host = {name: statistics.median(seconds for _, seconds in values) for name, values in samples.items() if values}
    if not torch.cuda.is_available():
        host = {}
        with contextlib.suppress(AttributeError):  # --benchmark-disable gives no times
            times = {ours: benchmark.stats.stats.median, **times}
    row = Row(benchmark.group or "", case, baseline, times, peaks, host, errors)
    ROWS.append(row)
    benchmark.extra_info.update(
        case=case,
        baseline=baseline,
        median_seconds=times,
        host_seconds=host,
        peak_extra_bytes=peaks,
        relative_errors=errors,
    )
    return row


def summary() -> list[str]:
    """All comparisons so far as lines of text, and the geometric mean of the speed-ups of each group."""
    lines = []
    for group in dict.fromkeys(row.group for row in ROWS):
        header = f"{group:43} {'side':12}{'ms':>10}{'speed-up':>14}{'peak MB':>10}{'largest error':>15}"
        lines.append(header + f"{'host ms':>10}" * torch.cuda.is_available())
        rows = [row for row in ROWS if row.group == group]
        for row in rows:
            for at, (name, seconds) in enumerate(row.times.items()):
                faster = f"{row.times[row.baseline] / seconds:.2f}" if row.baseline in row.times else ""
                peak = f"{row.memory[name] / MB:.1f}" if name in row.memory else ""
                error = f"{max(row.errors[name], default=0.0):.1e}"
                title = row.case if at == 0 else ""
                host = f"{row.host[name] * 1e3:10.3f}" if name in row.host else ""
                lines.append(f"  {title:42}{name:12}{seconds * 1e3:10.2f}{faster:>14}{peak:>10}{error:>15}{host}")
        ratios: dict[str, list[float]] = {}
        for row in rows:
            for name, seconds in row.times.items():
                if name != row.baseline and row.baseline in row.times:
                    ratios.setdefault(name, []).append(row.times[row.baseline] / seconds)
        for name, values in ratios.items():
            if group and len(values) > 1:
                mean = statistics.geometric_mean(values)
                lines.append(f"  {'geometric mean':42}{name:12}{'':10}{mean:14.2f}   least {min(values):.2f}")
    return lines
