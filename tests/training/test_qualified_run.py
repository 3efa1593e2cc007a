"""A run records which implementations its ops ran, and a resumed run gets the same ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastgan import checkpoint, ops
from fastgan.cli import train as program
from fastgan.ops import qualification
from fastgan.ops.dispatch.backend import PREFERENCE
from fastgan.ops.qualification import measurement

FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 0.2 --grown-at 0.1 "
    "--checkpoint-kimg 0.1 --log-kimg 0.1 --keep 50 --samples 4 --threads 1 --engine torch"
).split()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Measurements are on, with a cache of the test's own."""
    ops.backends("pixel_norm", torch.zeros(2, 3))  # the C++ library comes from the usual cache
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.delenv("FASTGAN_QUALIFY")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        patch.setattr(measurement, "_times", lambda op, key, cases, names: dict.fromkeys(names, (1.0, 1.0)))
        yield tmp_path / "cache"
    qualification.configure(enabled=True)
    torch.set_num_threads(threads)


def plain_first(found: Any, shipped: str) -> tuple[list[str], str]:
    return sorted(found, key=lambda name: -PREFERENCE.index(name)), "for this test"


def assert_same_end(a: Path, b: Path) -> None:
    for name in ("generator.safetensors", "training.safetensors"):
        ours, theirs = (load_file(checkpoint.existing(run)[-1] / name) for run in (a, b))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resume_is_bit_identical_and_elsewhere_says_what_differs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, again, elsewhere = (tmp_path / name for name in ("whole", "again", "elsewhere"))
    with monkeypatch.context() as patch:  # not what a resumed run would choose by itself
        patch.setattr(qualification, "choose_from", plain_first)
        assert program.main([*FLAGS, "--out", str(whole)]) == 0
    stored = checkpoint.read(whole, "run").meta["implementations"]
    assert stored["shipped"] is None and len(stored["classes"]) > 10
    assert "by measurement" in next(whole.glob("logs/*")).read_text()
    assert "fastgan:" not in capfd.readouterr().err
    for run in (again, elsewhere):
        shutil.copytree(whole, run)
    shutil.rmtree(checkpoint.existing(again)[1])
    shutil.rmtree(cache)
    assert program.main(["--resume", str(again)]) == 0
    assert_same_end(whole, again)
    assert "implementations" not in capfd.readouterr().out

    about = qualification.machine
    monkeypatch.setattr(qualification, "machine", lambda device: {**about(device), "driver": "580.2"})
    assert program.main(["--resume", str(elsewhere)]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if "implementations" in line]
    assert len(said) == 1 and said[0].endswith("results may differ by rounding: driver 580.2, not None")


@pytest.mark.parametrize("flag", ["--no-qualify", "--deterministic"])
def test_shipped_table_on_request(flag: str, cache: Path, tmp_path: Path) -> None:
    try:
        assert program.main([*FLAGS, "--kimg", "0.1", flag, "--out", str(tmp_path / "run")]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    stored = checkpoint.read(tmp_path / "run", "run").meta["implementations"]
    assert stored["shipped"] == {"--no-qualify": "switched off", "--deterministic": "deterministic algorithms"}[flag]
    assert not stored["classes"] and not list(cache.glob("fastgan/qualification/*.json"))
    qualification.configure(enabled=True)


def test_ranks_that_differ_are_named() -> None:
    records: list[dict[str, Any]] = [
        {"classes": {"a": ["cpp", "torch"], "b": None}},
        {"classes": {"a": ["cpp"], "c": None}},
        {"classes": {"b": ["torch"]}},
    ]
    assert qualification.conflict(records[:2]) is None
    said = qualification.conflict(records)
    assert said is not None and "of b: rank 0 chose the shipped one, rank 2 torch; a resume takes rank 0's" in said
