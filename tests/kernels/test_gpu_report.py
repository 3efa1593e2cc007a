"""benchmarks/gpu.py, which runs where there is a GPU, on reports as pytest writes them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = """
import pytest

def test_right():
    pass

def test_wrong():
    assert False

def test_time(benchmark):
    benchmark.extra_info["memory"] = {"ours": 1}
    benchmark(lambda: None)
"""


def test_reports_are_read(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_small.py").write_text(SMALL)
    junit, times = tmp_path / "tests.xml", tmp_path / "times.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--junitxml={junit}",
        f"--benchmark-json={times}",
        "test_small.py",
    ]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    assert subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True).returncode == 1
    counts = gpu.tests(junit)
    assert (counts["tests"], counts["failures"], counts["failed"]) == (3, 1, ["test_small::test_wrong"])
    (row,) = gpu.benchmarks(times)
    assert row["name"] == "test_time" and row["memory"] == {"ours": 1} and row["seconds"]["median"] > 0


def test_missing_reports_are_no_results(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.benchmarks(tmp_path / "none.json") == []
    assert gpu.tests(tmp_path / "none.xml") == {"error": "pytest wrote no report"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "there is no GPU here" in capsys.readouterr().err
