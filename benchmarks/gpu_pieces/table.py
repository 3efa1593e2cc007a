"""The results as text: the README's table, ready to paste, and what failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastgan.config.growth import stages_of
from fastgan.config.variants import VARIANTS

Rows = list[dict[str, Any]]


def _rows(results: dict[str, Any], number: int) -> Rows:
    found: Rows = results["pieces"].get(str(number), {}).get("rows", [])
    return [row for row in found if "fault" not in row]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _number(value: Any, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}"


def conditions(results: dict[str, Any]) -> str:
    """One line: the machine, the versions, the command."""
    machine = next((row for row in _rows(results, 0) if row["label"] == "machine"), {})
    packages = machine.get("packages", {})
    words = [
        machine.get("device", "unknown device"),
        f"torch {packages.get('torch')}",
        f"triton {packages.get('triton')}",
    ]
    words += [f"{name} {machine[name]}" for name in ("cuda", "driver") if machine.get(name)]
    sources = sorted({piece["source"] for piece in results["pieces"].values() if "source" in piece})
    words.append(f"revision {results.get('revision') or '-'} ({' '.join(sources)})")
    return f"`python3 benchmarks/gpu.py`, {', '.join(words)}"


def _steps(results: dict[str, Any]) -> list[str]:
    captured = {row["label"]: row for row in _rows(results, 5)}
    rows = []
    for row in sorted(_rows(results, 2), key=lambda it: (it["variant"], it["resolution"], it["precision"])):
        graph = captured.get(row["label"], {})
        rows.append(
            [
                f"{row['variant']} {row['resolution']} px",
                row["precision"],
                str(row["batch"]),
                *(_number(row[name]) for name in ("step_ms", "host_ms", "device_ms")),
                _number(graph.get("captured_ms")),
                _number(row["images_per_second"]),
                _number(row["peak_gb"]),
            ]
        )
    header = ["step", "precision", "batch", "ms", "host ms", "device ms", "as a graph, ms", "images/s", "peak GB"]
    return _table(header, rows) if rows else ["not measured"]


def _rate_at(resolution: int, rates: dict[int, float]) -> float:
    """Images a second, between measured resolutions by their logarithms."""
    known = sorted(rates)
    above = next((px for px in known if px >= resolution), known[-1])
    below = max((px for px in known if px <= resolution), default=known[0])
    share = 0.0 if above == below else math.log2(resolution / below) / math.log2(above / below)
    return math.exp((1 - share) * math.log(rates[below]) + share * math.log(rates[above]))


def _hours(results: dict[str, Any]) -> list[str]:
    """What the paper's run takes at the measured steps."""
    stages, lines = stages_of(VARIANTS["pggan"].config("paper")), []
    for precision in ("fp32", "tf32", "bf16"):
        rates = {
            row["resolution"]: row["images_per_second"]
            for row in _rows(results, 2)
            if row["variant"] == "pggan" and row["precision"] == precision
        }
        if 1024 in rates and 4 in rates:
            hours = sum((it.end - it.start) / _rate_at(it.resolution, rates) for it in stages) / 3600
            total = stages[-1].end / 1000
            lines.append(
                f"- {precision}: the {total:,.0f} kimg of the paper's preset take {hours:.1f} h at these steps"
            )
    return [*lines, "  (resolutions that were not measured lie between their neighbors)"] if lines else []


def _captured(results: dict[str, Any]) -> list[str]:
    rows = [
        [row["label"], f"{row['difference']:.1e}", *(_number(row[n]) for n in ("eager_ms", "captured_ms", "faster"))]
        for row in _rows(results, 5)
    ]
    return (
        _table(["step", "difference to eager", "eager ms", "as a graph, ms", "faster"], rows)
        if rows
        else ["not measured"]
    )


def _ops(results: dict[str, Any]) -> list[str]:
    rows = []
    for row in _rows(results, 1):
        for form, error in row["errors"].items():
            times = [_number(row[name].get(form)) for name in ("device_us", "host_us")]
            rows.append([row["label"], form, "inf" if error is None else f"{error:.1e}", *times])
    return _table(["op", "form", "error", "device us", "host us"], rows) if rows else ["not measured"]


def _forms(results: dict[str, Any]) -> list[str]:
    found = _rows(results, 4)
    steps = [[row["label"], _number(row["step_ms"]), _number(row["host_ms"])] for row in found if "form" in row]
    products = [
        [row["label"], form, _number(us)] for row in found if "us" in row for form, us in row["us"].items()
    ]  # fmt: skip
    return [
        *(_table(["step and form", "ms", "host ms"], steps) if steps else ["not measured"]),
        "",
        *(_table(["scaled convolution, to second order", "form", "device us"], products) if products else []),
    ]


def _profiles(results: dict[str, Any]) -> list[str]:
    lines = []
    for row in _rows(results, 3):
        lines.append(
            f"- {row['label']}: {row['launches']} launches, {row['idle_share']:.0%} of the step idle; the longest:"
        )
        lines += [f"  - {k['us'] / 1e3:.2f} ms, {k['launches']} x {k['name'][:80]}" for k in row["kernels"][:8]]
    return lines or ["not measured"]


def _batches(results: dict[str, Any]) -> list[str]:
    rows = [
        [str(row["batch"]), *(_number(row.get(name)) for name in ("step_ms", "images_per_second", "peak_gb"))]
        for row in _rows(results, 7)
    ]
    return _table(["batch at 1024 px", "ms", "images/s", "peak GB"], rows) if rows else ["not measured"]


def _tests(results: dict[str, Any]) -> list[str]:
    rows = results["pieces"].get("6", {}).get("rows", [])
    tests = [row for row in rows if "::" in row["label"]]
    failed = sum("fault" in row for row in tests)
    return [f"{len(tests) - failed} pass, {failed} fail or were skipped"] if tests else ["not run"]


def faults(results: dict[str, Any]) -> list[str]:
    """A line for each fault, by piece."""
    return [
        f"- piece {number}, {row['label']}: {row['fault'].strip().splitlines()[-1][:300]}"
        for number, piece in sorted(results["pieces"].items())
        for row in piece["rows"]
        if "fault" in row
    ]


def _steps_and_hours(results: dict[str, Any]) -> list[str]:
    return [conditions(results), "", *_steps(results), "", *_hours(results)]


_PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "Steps on a GPU (for the README)": _steps_and_hours,
    "The step as a CUDA graph": _captured,
    "Ops, forward and both backward passes": _ops,
    "Forms side by side": _forms,
    "Profiles": _profiles,
    "Larger batches": _batches,
    "Tests on the GPU": _tests,
    "Faults": lambda results: faults(results) or ["none"],
}


def text(results: dict[str, Any]) -> str:
    """All results as Markdown; the first table is the README's."""
    lines: list[str] = []
    for title, part in _PARTS.items():
        try:
            found = part(results)
        except Exception as error:  # the results are more than their table: it must not end what measures them
            found = [f"cannot be shown: {type(error).__name__}: {error}"]
        lines += ["", f"## {title}", "", *found]
    return "\n".join(lines).lstrip() + "\n"
