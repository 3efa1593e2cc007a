"""benchmarks/gpu.py, which runs where there is a GPU, on reports as pytest writes them."""

from __future__ import annotations

import importlib.util
import json
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
    assert (counts["tests"], counts["failures"]) == (3, 1)
    assert counts["failed"] == {"test_small::test_wrong": "assert False"}
    (row,) = gpu.benchmarks(times)
    assert row["name"] == "test_time" and row["memory"] == {"ours": 1} and row["seconds"]["median"] > 0


def test_missing_reports_are_no_results(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.benchmarks(tmp_path / "none.json") == []
    assert gpu.tests(tmp_path / "none.xml") == {"error": "pytest wrote no report"}


FILES = {
    "test_right.py": "def test_right():\n    pass\n",
    "test_wrong.py": "def test_wrong():\n    assert False\n",
    "test_crash.py": "import os\n\ndef test_crash():\n    os._exit(134)\n",
    "test_slow.py": "import time\n\ndef test_quick():\n    pass\n\ndef test_slow():\n    time.sleep(100)\n",
}


@pytest.fixture
def pieces(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """`gpu` in a folder of its own, as if there were a GPU; what `machine` says."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    where: dict[str, object] = {"gpu": "Small GPU 1", "revision": "a"}
    for name, value in {
        "ROOT": tmp_path,
        "RESULTS": tmp_path / "results",
        "PIECES": {name.removeprefix("test_").removesuffix(".py"): [name] for name in FILES},
        "machine": lambda: dict(where),
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in os.environ:
        if name.startswith("PYTEST_"):
            monkeypatch.delenv(name)
    return where


def test_a_piece_that_fails_or_crashes_costs_only_itself(
    gpu: ModuleType, pieces: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    del gpu.PIECES["slow"]
    assert gpu.main([]) == 1
    file = tmp_path / "results" / "small-gpu-1.json"
    found = json.loads(file.read_text())["pieces"]
    assert {name: it["exit_code"] for name, it in found.items()} == {"right": 0, "wrong": 1, "crash": 134}
    assert [it["done"] for it in found.values()] == [True, True, False]
    assert found["crash"]["tests"] == {"error": "pytest wrote no report"}
    capfd.readouterr()
    # The next call runs what crashed, alone; without it there is nothing to do.
    (tmp_path / "test_crash.py").write_text("def test_crash():\n    pass\n")
    assert gpu.main([]) == 1
    assert [line for line in capfd.readouterr().out.splitlines() if line in ("gpu: right", "gpu: crash")] == [
        "gpu: crash"
    ]
    assert gpu.main(["--list"]) == 0
    assert capfd.readouterr().out.split() == ["done", "right", "done", "wrong", "done", "crash"]
    assert gpu.main(["--only", "right", "-k", "left"]) == 0
    found = json.loads(file.read_text())["pieces"]
    assert found["right -k left"]["exit_code"] == 5 and found["right"]["tests"]["tests"] == 1
    assert gpu.pytest_arguments("right", "a", ["-x"]) == ["test_right.py", "-k", "a", "-x"]
    gpu.PIECES["right"] += ["-k", "b or c"]
    assert gpu.pytest_arguments("right", "a", []) == ["test_right.py", "-k", "(b or c) and (a)"]
    del gpu.PIECES["right"][1:]
    # Another revision starts afresh, and the old results stay.
    pieces["revision"] = "b"
    assert gpu.main(["--only", "right"]) == 0
    assert list(json.loads(file.read_text())["pieces"]) == ["right"]
    assert len(json.loads(file.with_name("small-gpu-1.before.json").read_text())["pieces"]) == 4


def test_a_piece_that_is_cut_off_is_left_for_the_next_call(
    gpu: ModuleType, pieces: dict[str, object], tmp_path: Path
) -> None:
    found = gpu.run_piece(gpu.PIECES["slow"], 4.0)
    assert (found["exit_code"], found["cut_off"], found["done"]) == (None, True, False)
    assert gpu.main(["--minutes", "1"]) == 2  # nothing is begun that has no time
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "there is no GPU here" in capsys.readouterr().err
