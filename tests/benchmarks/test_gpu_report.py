"""benchmarks/gpu.py without a GPU: reports of pytest, pieces that fail, crash or time out, and resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

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


def test_reports(tmp_path: Path) -> None:
    (tmp_path / "test_small.py").write_text(SMALL)
    junit, times = tmp_path / "tests.xml", tmp_path / "times.json"
    reports = [f"--junitxml={junit}", f"--benchmark-json={times}"]
    command = [sys.executable, "-m", "pytest", "-q", *reports, "test_small.py"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    assert subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True).returncode == 1
    counts = gpu.read_test_report(junit)
    assert (counts["tests"], counts["failures"]) == (3, 1)
    assert counts["failed"] == {"test_small::test_wrong": "assert False"}
    (row,) = gpu.read_benchmark_report(times)
    assert row["name"] == "test_time" and row["memory"] == {"ours": 1} and row["seconds"]["median"] > 0


def test_missing_reports(tmp_path: Path) -> None:
    assert gpu.read_benchmark_report(tmp_path / "none.json") == []
    assert gpu.read_test_report(tmp_path / "none.xml") == {"error": "pytest wrote no report"}


FILES = {
    "test_right.py": "def test_right():\n    pass\n",
    "test_wrong.py": "def test_wrong():\n    assert False\n",
    "test_crash.py": "import os\n\ndef test_crash():\n    os._exit(134)\n",
    "test_slow.py": "import time\n\ndef test_quick():\n    pass\n\ndef test_slow():\n    time.sleep(100)\n",
}


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run `gpu` in a temporary folder, as if there were a GPU. Returns the result of `machine`, to be changed."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    current: dict[str, object] = {"gpu": "Small GPU 1", "revision": "a"}
    for name, value in {
        "ROOT": tmp_path,
        "RESULTS": tmp_path / "results",
        "PIECES": {name.removeprefix("test_").removesuffix(".py"): [name] for name in FILES},
        "machine": lambda: dict(current),
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in os.environ:
        if name.startswith("PYTEST_"):
            monkeypatch.delenv(name)
    return current


def test_failures_and_crashes_do_not_affect_other_pieces(
    pieces: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    del gpu.PIECES["slow"]
    assert gpu.main([]) == 1
    file = tmp_path / "results" / "small-gpu-1.json"
    results = json.loads(file.read_text())["pieces"]
    assert {name: it["exit_code"] for name, it in results.items()} == {"right": 0, "wrong": 1, "crash": 134}
    assert [it["done"] for it in results.values()] == [True, True, False]
    assert results["crash"]["tests"] == {"error": "pytest wrote no report"}
    capfd.readouterr()
    # The next call repeats only the piece that crashed.
    (tmp_path / "test_crash.py").write_text("def test_crash():\n    pass\n")
    assert gpu.main([]) == 1
    assert [line for line in capfd.readouterr().out.splitlines() if line in ("gpu: right", "gpu: crash")] == [
        "gpu: crash"
    ]
    assert gpu.main(["--list"]) == 0
    assert capfd.readouterr().out.split() == ["done", "right", "done", "wrong", "done", "crash"]
    assert gpu.main(["--only", "right", "-k", "left"]) == 0
    results = json.loads(file.read_text())["pieces"]
    assert results["right -k left"]["exit_code"] == 5 and results["right"]["tests"]["tests"] == 1
    assert gpu.pytest_arguments("right", "a", ["-x"]) == ["test_right.py", "-k", "a", "-x"]
    gpu.PIECES["right"] += ["-k", "b or c"]
    assert gpu.pytest_arguments("right", "a", []) == ["test_right.py", "-k", "(b or c) and (a)"]
    del gpu.PIECES["right"][1:]
    # Another revision starts a new file and keeps the old one.
    pieces["revision"] = "b"
    assert gpu.main(["--only", "right"]) == 0
    assert list(json.loads(file.read_text())["pieces"]) == ["right"]
    assert len(json.loads(file.with_name("small-gpu-1.before.json").read_text())["pieces"]) == 4


def test_pieces_that_time_out_are_repeated(pieces: dict[str, object], tmp_path: Path) -> None:
    result = gpu.run_piece(gpu.PIECES["slow"], 4.0)
    assert (result["exit_code"], result["cut_off"], result["done"]) == (None, True, False)
    assert gpu.main(["--minutes", "1"]) == 2  # too short to start a piece
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err


def test_files_of_all_pieces_exist() -> None:
    for arguments in gpu.PIECES.values():
        paths = [word.removeprefix("--ignore=") for word in arguments if "tests/" in word or "benchmarks/" in word]
        assert paths and all((gpu.ROOT / path).exists() for path in paths), paths


def test_starts_without_an_installation(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(gpu.__file__), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr
