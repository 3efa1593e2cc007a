"""Named pipes in place of files: nothing waits for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgan.cli import train
from fastgan.data.preparation.state import lock_destination
from fastgan.data.prepared.manifest import is_prepared, read_manifest
from fastgan.errors import ArgumentError
from fastgan.export import model_card
from fastgan.training import run_directory
from fastgan.training.observability.metrics_log import MetricsLog
from fastgan.utils.files import append_regular, read_regular

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
TINY = "--variant dcgan --width 8 --max-width 8 --latent 4 --batch 8 --resolution 8 --kimg 0.064 --samples 4".split()


@pytest.mark.parametrize("use", [read_regular, lambda file: append_regular(file, "x")])
def test_a_pipe_is_refused_at_once(tmp_path: Path, use: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        use(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # with a reader, writing would begin
    with pytest.raises(OSError, match="not a regular file"):
        use(tmp_path / "pipe")
    os.close(reader)


def test_files_are_read_and_appended_to(tmp_path: Path) -> None:
    append_regular(tmp_path / "a", "ä\n")
    append_regular(tmp_path / "a", "b\n")
    assert read_regular(tmp_path / "a") == "ä\nb\n".encode()


def test_pipes_of_a_run_and_of_a_set(tmp_path: Path) -> None:
    for name in (".lock", "metrics.jsonl", "evaluation.jsonl", "manifest.json", "README.md"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ArgumentError, match=r"--out must be a folder that can be written .not a regular file"):
        run_directory.locked(tmp_path, "--out").__enter__()
    with pytest.raises(OSError, match="not a regular file"):
        MetricsLog(tmp_path, active=True, total=1000, seen=0)
    assert model_card.evaluations(tmp_path, 0) == []
    assert not model_card.may_replace(tmp_path / "README.md")
    assert not is_prepared(tmp_path)
    with pytest.raises(ArgumentError, match=r"manifest\.json cannot be read .not a regular file"):
        read_manifest(tmp_path)
    (tmp_path / "set" / ".preparing").mkdir(parents=True)
    os.mkfifo(tmp_path / "set" / ".preparing" / "lock")
    with pytest.raises(ArgumentError, match="not a regular file"), lock_destination(tmp_path / "set"):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_a_resumed_run_says_why_it_does_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    run = tmp_path / "run"
    assert train.main([*TINY, "--out", str(run)]) == 0
    (run / name).unlink()
    os.mkfifo(run / name)
    command = [sys.executable, "-m", "fastgan", "train", "--resume", str(run), "--kimg", "0.128"]
    capfd.readouterr()
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "not a regular file" in line
