"""`fastgan doctor --qualify`: the table, its file, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan import ops
from fastgan.cli import doctor, qualification_table
from fastgan.ops import qualification
from fastgan.ops.qualification import beforehand as qualification_beforehand
from fastgan.ops.qualification import measurement


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Measurements are on, of two small shapes, with a clock that says 100 us."""
    ops.backends("pixel_norm", torch.zeros(2, 3))  # the C++ library comes from the usual cache
    with monkeypatch.context() as patch:
        patch.delenv("FASTGAN_QUALIFY")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        patch.setattr(measurement, "_times", lambda op, key, cases, names: dict.fromkeys(names, (100.0, 30.0)))
        patch.setattr(qualification_beforehand, "SHAPES", [(4, 16, 4, 4)])
        patch.setattr(qualification_beforehand, "QUERIES", [(1, 1, 16, 8)])
        qualification.configure(enabled=True)
        yield tmp_path / "cache" / "fastgan" / "qualification"
    qualification.configure(enabled=True)


@pytest.fixture
def patch(cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """Undone before `cache` is, which has patched the same."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_qualify_prints_and_writes_the_table(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--qualify", "--out", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if line.startswith("op  "))
    for word in ("dtype", "size class", "implementation", "error", "device us", "host us", "chosen"):
        assert word in header
    rows = [line for line in text.splitlines() if "contiguous 4^" in line or "strided 4^" in line]
    assert {line.split()[0] for line in rows} == set(qualification_beforehand.MEASURED_OPS)
    assert {line.split()[1] for line in rows} == {"float32", "bfloat16"}
    assert not any("WRONG" in line for line in rows)
    assert all("         100        30  " in line for line in rows)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert sum(len(it["forms"]) for it in found["classes"].values()) == len(rows)
    assert found["machine"]["torch"] == torch.__version__
    # A run finds them.
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["classes"] == found["classes"]
    monkeypatch.setattr(qualification, "measure", None)
    qualification.configure(enabled=True)
    doctor._print_kernels()
    measured = len(found["classes"])
    line = f"  cpu: implementations: {measured} classes of calls by measurement, all others by the shipped table"
    assert line in capsys.readouterr().out.splitlines()
    x = torch.randn(4, 16, 4, 4)
    ops.pixel_norm(x)
    assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by measurement")


def test_qualify_goes_on_where_it_was(
    cache: Path, patch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, it has kept what it measured; what other work disturbed is measured again, and nothing else."""
    words = ["--qualify", "--out", str(tmp_path / "found.json")]
    measure, timed, calls = measurement._measure, [], 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return measure(*given)

    patch.setattr(qualification_beforehand, "MEASURED_OPS", ("pixel_norm", "avg_pool2d"))
    patch.setattr(measurement, "_measure", interrupted)
    assert doctor.main(words) == 130
    assert not (tmp_path / "found.json").exists()

    def disturbed_once(op: Any, key: Any, cases: Any, names: list[str]) -> dict[str, tuple[float, float]]:
        timed.append(qualification.label_of(op, key))
        return dict.fromkeys(names, (float("inf") if len(timed) == 1 else 100.0, 30.0))

    patch.setattr(measurement, "_times", disturbed_once)
    assert doctor.main(words) == 0
    told = capsys.readouterr().out
    classes = json.loads((tmp_path / "found.json").read_text())[0]["classes"]
    assert f"cpu: {len(classes)} classes of calls, some known from before (--anew measures them too): 3" in told
    assert len(classes) == 8 and not any("until" in entry for entry in classes.values())
    assert timed.count(timed[0]) == 2 and len(set(timed)) == len(timed) - 1 == 5
    assert doctor.main([*words, "--anew"]) == 0
    assert len(timed) == 6 + 8


def test_progress_says_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(qualification_table.time, "monotonic", lambda: now[0])
    progress = qualification_table._Progress(100)
    for _ in range(40):  # known from before
        progress.advance(False)
    for _ in range(30):
        now[0] += 6.0
        progress.advance(True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fastgan: 45 of 100, about 6 min left" and len(lines) == 6


def test_rows_of_a_wrong_implementation() -> None:
    right = {"error": 1e-7, "device_us": 12.3, "host_us": 4.0, "wrong": None}
    wrong = {"error": None, "device_us": None, "host_us": None, "wrong": "error inf in its result"}
    entry = {"order": ["torch"], "why": "the fastest", "forms": {"triton": wrong, "torch": right}}
    first, second = qualification_table.lines("pixel_norm cuda float16 contiguous 4^9", entry)
    assert first.split() == "pixel_norm float16 contiguous 4^9 torch 1.0e-07 12 4 yes: the fastest".split()
    assert second.endswith("WRONG: error inf in its result") and " inf " in second and " - " in second


def test_what_qualify_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--qualify"]) == 2  # the tests' own FASTGAN_QUALIFY
    assert "--qualify" in (told := capsys.readouterr().err) and "nothing can be measured: FASTGAN_QUALIFY=0" in told
    assert doctor.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "it is for --qualify: add that, or remove it" in capsys.readouterr().err
    assert doctor.main(["--anew"]) == 2
    assert "--anew True: " in (told := capsys.readouterr().err) and "it is for --qualify" in told


def test_results_that_cannot_be_written_are_refused_before_the_work(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--qualify", "--out", str(tmp_path / "no" / "found.json")]) == 2
    assert "must be a file in an existing, writable folder" in capsys.readouterr().err
    assert not cache.exists()


def test_results_go_to_the_checkout() -> None:
    file = qualification_table.default_file("NVIDIA H200, 2 threads")
    assert file is not None
    assert file.parts[-3:] == ("benchmarks", "results", "qualification-nvidia-h200-2-threads.json")
