"""Every reader of files and requests of others against thousands of mutated and forged ones; see docs/security.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import readers

FULL, QUICK = 2000, 20
LIMIT = 512 * 2**20  # bytes above the idle process


def fuzz_alone(reader: str, count: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    line = [sys.executable, str(Path(fuzzing.__file__)), reader, str(count), str(seed), str(folder)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(found: dict[str, Any], count: int) -> None:
    assert found["cases"] == count
    assert not found["wrong"], f"{found['count']}: " + "\n".join(found["wrong"])
    assert found["memory"] < LIMIT
    assert found["refused"] > count // 10  # most of them are damaged


@pytest.mark.parametrize("reader", [name for name in readers.READERS if name != "page"])
def test_a_sample_of_files(tmp_path: Path, reader: str) -> None:
    """In this process, which has imported everything; its memory is not measured."""
    check(fuzzing.fuzz(reader, QUICK, 0, tmp_path) | {"memory": 0}, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("reader", [name for name in readers.READERS if name != "page"])
def test_thousands_of_files(tmp_path: Path, reader: str) -> None:
    check(fuzz_alone(reader, FULL, tmp_path, seed=1), FULL)


@pytest.mark.slow
def test_thousands_of_requests(tmp_path: Path) -> None:
    found = fuzz_alone("page", FULL, tmp_path, seed=1)
    assert found["cases"] == FULL and not found["wrong"], "\n".join(found["wrong"])
    assert found["memory"] < LIMIT
