"""Piece 6: the tests that need a GPU, in a fixed shuffled order; each result is written when it is known."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_pieces.context import Context

ROOT = Path(__file__).resolve().parents[2]
_WORKERS, _SECONDS = 12, 60
# What a rehearsal runs in place of the tests for a GPU.
_REHEARSED = ["-m", "not slow and not gpu", "tests/utils/test_buckets.py", "tests/test_functional.py", "-k", "bucket"]


def run(context: Context) -> None:
    if importlib.util.find_spec("pytest") is None:
        context.row("tests", {"fault": "pytest is not installed: put its wheels into wheels/"})
        return
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.gpu_pieces.pytest_plugin",
        "-p",
        "no:cacheprovider",
    ]
    words += _REHEARSED if context.rehearse else ["-m", "gpu", "tests"]
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", "0" if context.rehearse else str(_WORKERS)]
    if importlib.util.find_spec("pytest_timeout") is not None:
        words += ["--timeout", str(_SECONDS)]
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder, "done.json")
        done.write_text(json.dumps(sorted(context.done)))
        environment = {**os.environ, "FASTGAN_PIECE_ROWS": str(context.rows), "FASTGAN_PIECE_DONE": str(done)}
        environment.pop("FASTGAN_QUALIFY", None)
        code = subprocess.run(words, cwd=ROOT, env=environment).returncode
    # 0: all passed; 1: some failed, which have rows; 5: none was left to run.
    context.row("pytest", {"exit_code": code} if code in (0, 1, 5) else {"fault": f"pytest ended with code {code}"})
