"""A launcher's default port that another run of this host has already taken."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "fastgan" / "train.py"
FLAGS = "--variant lsgan --width 4 --latent 8 --resolution 8 --batch 8 --kimg 0.016 --samples 4 --device cpu"


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def _rank(port: int, size: int, *flags: str) -> subprocess.CompletedProcess[str]:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *FLAGS.split(), *flags],
        env={**os.environ, **variables, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_several_ranks_are_told_what_to_do(tmp_path: Path, port: int) -> None:
    done = _rank(port, 2, "--engine", "torch", "--timeout", "5", "--out", str(tmp_path / "run"))
    assert done.returncode == 75
    (line,) = done.stderr.splitlines()
    assert f"through 127.0.0.1:{port} (" in line and line.endswith("give the launcher its own --master_port")


@pytest.mark.slow
def test_a_single_rank_needs_no_port(tmp_path: Path, port: int) -> None:
    pytest.importorskip("deepspeed", reason="the engine that makes a process group for one rank")
    done = _rank(port, 1, "--engine", "deepspeed", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "engine deepspeed" in done.stdout
