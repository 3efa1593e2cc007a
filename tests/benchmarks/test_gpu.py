"""benchmarks/gpu.py without a GPU: pieces that fail, hang or end, what is kept, resuming, the table, rehearsal."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_pieces import op_forms, pieces, table
from benchmarks.gpu_pieces.context import Context
from benchmarks.gpu_pieces.pieces import PIECES, Piece, run_piece
from fastgan.ops.qualification.cases import MEASURED_OPS
from fastgan.ops.qualification.measurement import Measurement

# What a piece may do, as a program of (rows, before).
WRITE = """
import json, os, sys, time
rows, before = sys.argv[1], json.load(open(sys.argv[2]))
def row(label, **values):
    with open(rows, "a") as file: file.write(json.dumps({"label": label, **values}) + chr(10))
"""
PROGRAMS = {
    "right": "row('a', x=1); row('b', x=2)",
    "wrong": "row('a', x=1); row('b', fault='no'); sys.exit(1)",
    "hangs": "row('a', x=1); row('b', x=2) if 'a' in before['done'] else time.sleep(60)",
    "crashes": "row('a', x=1); os._exit(134)",
    "half a row": "file = open(rows, 'a'); file.write('{'); file.flush(); os._exit(134)",
    "mended": "row('b', x=2) if 'b' in before['faulted'] and before['done'] == ['a'] else None",
    "breaks the GPU": "row('b', x=2) if 'a' in before['faulted'] else (row('a', fault='broken'), sys.exit(3))",
}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of `PROGRAMS`: the last one is what a piece runs."""
    chosen = ["right"]

    def command(piece: Piece, rows: Path, before: Path, rehearse: bool) -> list[str]:
        return [sys.executable, "-c", WRITE + PROGRAMS[chosen[-1]], str(rows), str(before)]

    monkeypatch.setattr(pieces, "command", command)
    return chosen


def run(program: list[str], name: str, before: list[dict[str, Any]] | None = None, limit: float = 30.0) -> Any:
    program.append(name)
    return run_piece(PIECES[0], limit, before or [], io_log(), rehearse=True, path="")


def io_log() -> Any:
    return open(os.devnull, "ab")


def labels(entry: dict[str, Any]) -> dict[str, bool]:
    return {row["label"]: "fault" in row for row in entry["rows"]}


def test_what_a_piece_wrote_is_kept_however_it_ends(program: list[str]) -> None:
    found = run(program, "right")
    assert found["done"] and found["exit_code"] == 0 and labels(found) == {"a": False, "b": False}
    found = run(program, "wrong")
    assert not found["done"] and found["exit_code"] == 1 and labels(found) == {"a": False, "b": True}
    found = run(program, "crashes")
    assert not found["done"] and found["exit_code"] == 134 and labels(found) == {"a": False, "process": True}
    found = run(program, "half a row")
    assert labels(found) == {"process": True}
    found = run(program, "hangs", limit=1.0)
    assert not found["done"] and found["exit_code"] is None and labels(found) == {"a": False}
    assert labels(run(program, "hangs", found["rows"])) == {"a": False, "b": False}


def test_a_second_run_repeats_faults_and_nothing_else(program: list[str]) -> None:
    found = run(program, "mended", run(program, "wrong")["rows"])
    assert found["done"] and labels(found) == {"a": False, "b": False}


def test_what_is_left_after_a_broken_gpu_runs_in_another_process(program: list[str]) -> None:
    found = run(program, "breaks the GPU")
    assert labels(found) == {"a": True, "b": False} or labels(found) == {"b": False}
    assert found["exit_code"] == 0


def test_faults_of_a_measurement_do_not_end_the_others(tmp_path: Path) -> None:
    context = Context(tmp_path / "rows", True, frozenset({"done"}), frozenset({"failed"}))
    order: list[str] = []

    def measure(label: str) -> dict[str, Any]:
        order.append(label)
        if label == "wrong":
            raise ValueError("a shape\nand more")
        return {"x": 1.5}

    for label in ("done", "failed", "wrong", "right"):
        context.attempt(label, lambda label=label: measure(label))  # type: ignore[misc]
    context.finish()
    assert order == ["wrong", "right", "failed"] and context.faults == 1
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["label"] for row in rows] == order and rows[0]["fault"].startswith("ValueError: a shape")


def test_calls_resume_from_each_other(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 0.5)
    words = ["--out", str(tmp_path), "--rehearse", "--only", "0", "1"]
    program.append("wrong")
    assert gpu.main(words) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["pieces"]) == ["0", "1"] and results["pieces"]["0"]["source"] == gpu.source_digest()
    assert "piece 0, b: no" in capsys.readouterr().out
    program.append("mended")
    assert gpu.main(words) == 0
    program.append("crashes")  # nothing is left to run
    assert gpu.main(words) == 0
    assert gpu.main([*words, "2", "--minutes", "0.05"]) == 2  # too little time for a piece
    other = tmp_path / "other"  # a folder that is emptied between calls
    assert gpu.main([*words, "--out", str(other), "--before", str(tmp_path / "results.json")]) == 0
    monkeypatch.setattr(gpu, "machine", lambda: {"gpus": "another"})
    program.append("right")
    assert gpu.main(words) == 0
    assert (tmp_path / "results.before.json").is_file()


RESULTS: dict[str, Any] = {
    "revision": "abc",
    "pieces": {
        "0": {"source": "0123", "rows": [{"label": "machine", "device": "A GPU", "packages": {"torch": "2.11"}}]},
        "2": {
            "source": "0123",
            "rows": [
                {
                    "label": f"pggan {px} px bf16", "variant": "pggan", "resolution": px, "precision": "bf16",
                    "batch": 4, "step_ms": 1.5 * px, "host_ms": 7.0, "device_ms": 1.25 * px,
                    "images_per_second": 64.0, "peak_gb": 3.0,
                }
                for px in (1024, 4)
            ],
        },
        "5": {
            "rows": [
                {"label": "pggan 4 px bf16", "difference": 0.0, "eager_ms": 6.0, "captured_ms": 2.0, "faster": 3.0},
                {"label": "pggan 64 px bf16", "fault": "it cannot be captured"},
            ]
        },
    },
}  # fmt: skip


def test_table_is_ready_to_paste() -> None:
    text = table.text(RESULTS)
    assert "`python3 benchmarks/gpu.py`, A GPU, torch 2.11" in text
    assert "| pggan 4 px | bf16 | 4 | 6.00 | 7.00 | 5.00 | 2.00 | 64.0 | 3.00 |" in text
    assert "| pggan 1024 px | bf16 | 4 | 1,536 | 7.00 | 1,280 | - | 64.0 | 3.00 |" in text
    assert "take 52.1 h at these steps" in text  # 12,000 kimg at 64 images a second
    assert "- piece 5, pggan 64 px bf16: it cannot be captured" in text
    assert "not measured" in text and "not run" in text


def test_a_row_that_is_not_as_expected_ends_nothing() -> None:
    text = table.text({"pieces": {"1": {"rows": [{"label": "an op"}]}}})
    assert "cannot be shown: KeyError: 'errors'" in text and text.rstrip().endswith("none")


def test_a_time_that_was_disturbed_and_an_error_of_nan_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "lean": Measurement(math.inf, device_us=math.inf, host_us=2.0),
        "torch": Measurement(1e-7, device_us=4.0, host_us=math.inf),
    }
    monkeypatch.setattr(op_forms, "measure", lambda *_: found)
    row = {"label": "pixel_norm", **op_forms._compare("pixel_norm", (torch.ones(2, 3),), {})}
    json.dumps(row, allow_nan=False)
    text = table.text({"pieces": {"1": {"rows": [row]}}})
    assert "| pixel_norm | lean | inf | - | 2.00 |" in text and "| pixel_norm | torch | 1.0e-07 | 4.00 | - |" in text
    assert table._number(math.inf) == "-"


def test_rates_lie_between_measured_ones() -> None:
    rates = {4: 1000.0, 64: 100.0, 1024: 1.0}
    assert table._rate_at(64, rates) == pytest.approx(100.0)
    assert table._rate_at(16, rates) == pytest.approx(1000.0 * 0.1**0.5)
    assert table._rate_at(2048, rates) == pytest.approx(1.0)


def test_wheels_beside_the_benchmarks_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.unpacked_wheels(tmp_path / "site") is None
    (tmp_path / "wheels").mkdir()
    for name in ("small-1.0-py3-none-any", "other-1.0-cp27-cp27m-manylinux1_x86_64"):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name.split('-')[0]}.py", "VALUE = 3")
    assert gpu.unpacked_wheels(tmp_path / "site") == str(tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["small.py"]


def test_starts_without_an_installation(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(gpu.__file__), "--list"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "5 the step as a CUDA graph" in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about a machine without a GPU")
def test_missing_gpu_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "none")]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "none").exists()


def rehearse(tmp_path: Path, *numbers: int) -> dict[str, Any]:
    """The results of pieces that run for real, on the CPU."""
    words = ["--out", str(tmp_path), "--rehearse", "--only", *map(str, numbers)]
    assert gpu.main(words) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())["pieces"]
    assert all(piece["done"] and piece["rows"] for piece in found.values())
    return found


def test_first_piece_runs_on_the_cpu(tmp_path: Path) -> None:
    rows = rehearse(tmp_path, 0)["0"]["rows"]
    assert {"machine", "library cpu", "backends pixel_norm"} <= {row["label"] for row in rows}


@pytest.mark.slow
def test_every_piece_runs_on_the_cpu(tmp_path: Path) -> None:
    found = rehearse(tmp_path, *(piece.number for piece in PIECES))
    assert len(found) == len(PIECES)
    assert {row["label"].split(" ")[0] for row in found["1"]["rows"]} == {"random", *MEASURED_OPS}
    text = (tmp_path / "table.md").read_text()
    assert not any(word in text for word in ("not measured", "not run", "cannot be shown"))
    assert text.rstrip().endswith("none")
