"""The part of `fastgan doctor --qualify`: measures, prints the table and writes it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fastgan.errors import ArgumentError
from fastgan.utils.files import write_atomic

_HEADER = ("op", "dtype", "size class", "implementation", "error", "device us", "host us", "chosen")
_FORMAT = "{:22} {:9} {:38} {:14} {:>8} {:>11} {:>9}  {}"


def default_file(name: str) -> Path | None:
    """benchmarks/results/qualification-DEVICE.json of a checkout; None in an installation."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return results / f"qualification-{slug}.json" if results.is_dir() else None


def run(out: str | None) -> None:
    """Measure every op on every device here, beforehand.

    Args:
        out: file for the results; None: in benchmarks/results/ of a checkout, else none.

    Raises:
        ArgumentError: measurements are switched off, or a file cannot be written.
    """
    from fastgan.ops import qualification
    from fastgan.ops.qualification.beforehand import calls, devices, dtypes
    from fastgan.ops.qualification.cache import Unwritable, machine

    off = qualification.mode()
    if off is not None:
        raise ArgumentError("--qualify", True, f"nothing can be measured: {off}")
    parent = None if out is None else Path(out).absolute().parent
    if parent is not None and not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ArgumentError("--out", out, "must be a file in an existing, writable folder")
    print("implementations on this machine, forward and both backward passes (with nothing else running, please)")
    print(_FORMAT.format(*_HEADER))
    results: list[dict[str, Any]] = []
    try:
        for device in devices():
            rows: dict[str, Any] = {}
            for dtype in dtypes(device):
                for name, inputs, options in calls(device, dtype):
                    label, entry = qualification.qualify(name, inputs, options)
                    rows[label] = entry
                    for line in lines(label, entry):
                        print(line, flush=True)
            results.append({"machine": machine(device), "classes": rows})
    except Unwritable as error:
        raise ArgumentError("--qualify", True, str(error)) from None
    _write(results, out)


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
            write_atomic(file, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            raise ArgumentError("--out", str(file), f"cannot be written ({error.strerror})") from None
        print(f"written to {file}")
