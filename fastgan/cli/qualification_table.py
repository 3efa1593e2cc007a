"""The part of `fastgan doctor --qualify`: measures, prints the table and writes it."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgan.errors import ArgumentError
from fastgan.utils.files import write_atomic

if TYPE_CHECKING:
    import torch

_ROUNDS = 3  # what other work has disturbed is measured again so often
_SECONDS_BETWEEN = 30.0
_HEADER = ("op", "dtype", "size class", "implementation", "error", "device us", "host us", "chosen")
_FORMAT = "{:22} {:9} {:38} {:14} {:>8} {:>11} {:>9}  {}"


def default_file(name: str) -> Path | None:
    """benchmarks/results/qualification-DEVICE.json of a checkout; None in an installation."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return results / f"qualification-{slug}.json" if results.is_dir() else None


def run(out: str | None, anew: bool = False) -> None:
    """Measure every op on every device here, beforehand. What is measured is kept at once, so that it can be continued.

    Args:
        out: file for the results; None: in benchmarks/results/ of a checkout, else none.
        anew: measure also what is known from before.

    Raises:
        ArgumentError: measurements are switched off, or a file cannot be written.
    """
    from fastgan.ops import qualification
    from fastgan.ops.qualification.beforehand import devices
    from fastgan.ops.qualification.cache import Unwritable, machine

    off = qualification.mode()
    if off is not None:
        raise ArgumentError("--qualify", True, f"nothing can be measured: {off}")
    parent = None if out is None else Path(out).absolute().parent
    if parent is not None and not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ArgumentError("--out", out, "must be a file in an existing, writable folder")
    print("implementations on this machine, forward and both backward passes (with nothing else running, please)")
    try:
        results = [{"machine": machine(device), "classes": _measured(device, anew)} for device in devices()]
    except Unwritable as error:
        raise ArgumentError("--qualify", True, str(error)) from None
    _write(results, out)


def _measured(device: torch.device, anew: bool) -> dict[str, Any]:
    """The classes of a device, by label; their rows are printed. What other work disturbed is measured again."""
    from fastgan.ops import qualification
    from fastgan.ops.qualification.beforehand import calls, dtypes

    count = sum(1 for dtype in dtypes(device) for _ in calls(device, dtype))
    before: set[str] = set() if anew else qualification.known(device)
    of_these = f", some known from before (--anew measures them too): {len(before)}" if before else ""
    print(f"{device}: {count} classes of calls{of_these}")
    print(_FORMAT.format(*_HEADER))
    rows: dict[int, tuple[str, dict[str, Any]]] = {}
    for _ in range(_ROUNDS):
        progress = _Progress(count - len(rows))
        for i, call in enumerate(call for dtype in dtypes(device) for call in calls(device, dtype)):
            if i in rows:
                continue
            label, entry = qualification.qualify(*call, anew=anew)
            if "until" not in entry:
                rows[i] = label, entry
                print("\n".join(lines(label, entry)), flush=True)
            progress.advance(label not in before)
        if len(rows) == count:
            break
    if len(rows) < count:
        print(
            f"{count - len(rows)} classes were disturbed by other work {_ROUNDS} times: call it again to measure them"
        )
    return dict(rows[i] for i in sorted(rows))


class _Progress:
    """Says on stderr, about twice a minute, how much is done and how long the rest will take."""

    def __init__(self, count: int) -> None:
        self.count, self.done, self.measured = count, 0, 0
        self.began = self.told = time.monotonic()

    def advance(self, measured: bool) -> None:
        """One class more is done; `measured`: now, not before."""
        self.done += 1
        self.measured += measured
        now = time.monotonic()
        if self.measured and now - self.told >= _SECONDS_BETWEEN and self.done < self.count:
            self.told = now
            left = (now - self.began) / self.measured * (self.count - self.done) / 60
            print(f"fastgan: {self.done} of {self.count}, about {left:.0f} min left", file=sys.stderr, flush=True)


def lines(label: str, entry: dict[str, Any]) -> list[str]:
    """The rows of one class, one for each implementation, the default first."""
    op, _, dtype, *rest = label.split(" ")
    rows = []
    for form in (*entry["order"], *(name for name in entry["forms"] if name not in entry["order"])):
        it = entry["forms"][form]
        error = "inf" if it["error"] is None else f"{it['error']:.1e}"
        device, host = ("-" if it[key] is None else f"{it[key]:.0f}" for key in ("device_us", "host_us"))
        chosen = f"WRONG: {it['wrong']}" if it["wrong"] else "no"
        if form == entry["order"][0]:
            chosen = f"yes: {entry['why']}"
        rows.append(_FORMAT.format(op, dtype, " ".join(rest), form, error, device, host, chosen))
    return rows


def _write(results: list[dict[str, Any]], out: str | None) -> None:
    """Write one file for each device, or all into `out`."""
    if out is not None:
        targets = {Path(out): results}
    else:
        files = [(default_file(it["machine"]["device"]), it) for it in results]
        targets = {file: [it] for file, it in files if file is not None}
    for file, content in targets.items():
        try:
            write_atomic(file, _lines(content).encode())
        except OSError as error:
            raise ArgumentError("--out", str(file), f"cannot be written ({error.strerror})") from None
        print(f"written to {file}")


def _lines(content: list[dict[str, Any]]) -> str:
    """JSON with a line for each class of calls, so that two tables can be compared line by line."""
    parts = []
    for found in content:
        head = {name: value for name, value in found.items() if name != "classes"}
        rows = ",\n".join(f"{json.dumps(label)}: {json.dumps(entry)}" for label, entry in found["classes"].items())
        parts.append(f'{json.dumps(head)[:-1]}, "classes": {{\n{rows}\n}}}}')
    return "[" + ",\n".join(parts) + "]\n"
