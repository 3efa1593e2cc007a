"""The list of pieces, most telling first, and the process of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Piece(NamedTuple):
    """Attributes: its number and title, its limit in seconds, and the function of a Context that is it."""

    number: int
    title: str
    seconds: float
    module: str
    function: str = "run"


_KINDS = (("done", False), ("faulted", True))
PIECES = (
    Piece(0, "machine, libraries, what runs each op", 45, "versions"),
    Piece(1, "every op and form against float64, to second order; random numbers", 60, "op_forms"),
    Piece(2, "training steps: host, device, memory", 90, "steps"),
    Piece(3, "profiles at 64 and 1024 px", 45, "profiles"),
    Piece(4, "forms side by side; scaled convolutions beside cuDNN", 60, "step_forms"),
    Piece(5, "the step as a CUDA graph", 60, "captured"),
    Piece(6, "pytest -m gpu", 180, "gpu_tests"),
    Piece(7, "larger batches at 1024 px", 30, "steps", "run_larger_batches"),
    Piece(8, "compute-sanitizer", 60, "sanitizer"),
)


Rows = list[dict[str, Any]]
_AGAIN = 3
"""Exit code of a piece after a fault that broke the GPU for its process: what is left runs in another one."""


def command(piece: Piece, rows: Path, before: Path, rehearse: bool) -> list[str]:
    """The process of a piece."""
    words = [sys.executable, "-m", "benchmarks.gpu_pieces", str(piece.number), "--rows", str(rows)]
    return [*words, "--before", str(before), *["--rehearse"] * rehearse]


def run_piece(piece: Piece, limit: float, before: Rows, log: IO[bytes], *, rehearse: bool, path: str) -> dict[str, Any]:
    """Run a piece for at most `limit` seconds, without what its earlier rows have.

    Args:
        piece: which.
        limit: after it the process and all that it started are killed; rows that it has written are kept.
        before: rows of earlier runs.
        log: gets what it prints.
        rehearse: on the CPU.
        path: of Python modules.

    Returns:
        The entry for the results: "rows", "exit_code" (None: killed), "seconds", and "done": it ran to its end without
        a fault.
    """
    began, rows, code, tries = time.monotonic(), {row["label"]: row for row in before}, None, 0
    while code == _AGAIN or not tries:
        left, tries = limit - (time.monotonic() - began), tries + 1
        known = len(rows)
        code, found = _run(piece, left, list(rows.values()), log, rehearse, path)
        failed = code not in (None, 0, 1) and not any("fault" in row for row in found)
        if failed:
            found.append({"label": "process", "fault": f"ended with code {code}; its last words are in the log"})
        # A fault of an earlier run is gone once its measurement, or the whole piece, has succeeded.
        kept = {label: row for label, row in rows.items() if "fault" not in row or code != 0}
        rows = {**kept, **{row["label"]: row for row in found}}
        if code == _AGAIN and (len(rows) == known or limit - (time.monotonic() - began) < 10):
            break
    return {
        "title": piece.title,
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "done": code == 0 and not any("fault" in row for row in rows.values()),
        "rows": list(rows.values()),
    }


def _run(
    piece: Piece, limit: float, before: Rows, log: IO[bytes], rehearse: bool, path: str
) -> tuple[int | None, Rows]:
    """One process of a piece: its exit code, None if it was killed, and the rows that it wrote."""
    environment = {**os.environ, "PYTHONPATH": path, "FASTGAN_QUALIFY": os.environ.get("FASTGAN_QUALIFY", "0")}
    if rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment["FASTGAN_BUILD"] = (
            "force"  # a library that does not build is a fault, not a reason for another form
        )
    with tempfile.TemporaryDirectory() as folder:
        rows, known = Path(folder, "rows.jsonl"), Path(folder, "before.json")
        labels = {name: [row["label"] for row in before if ("fault" in row) is fault] for name, fault in _KINDS}
        known.write_text(json.dumps(labels))
        rows.touch()
        process = subprocess.Popen(
            command(piece, rows, known, rehearse),
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # what it started too, after Ctrl-C as well
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return code, [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")]
