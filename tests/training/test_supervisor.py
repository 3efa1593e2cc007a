"""`--max-restarts`: a run that is killed goes on by itself, and ends as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgan import checkpoint, train
from fastgan.errors import ArgumentError
from fastgan.training.supervisor import rank_hosts, read_hostfile

SCRIPT = Path(train.__file__)
FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 0.8 --fade-kimg 0.2 "
    "--stable-kimg 0.4 --checkpoint-kimg 0.1 --keep 50 --samples 4 --deterministic --threads 1"
).split()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the child to kill in /proc")
def test_killed_process_is_started_again_and_ends_bit_identical(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    line = [sys.executable, str(SCRIPT), *FLAGS]
    assert subprocess.run([*line, "--out", str(whole)], stdout=subprocess.DEVNULL).returncode == 0
    supervised = subprocess.Popen([*line, "--out", str(run), "--max-restarts", "1"], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
    while len(checkpoint.existing(run)) < 3:
        assert supervised.poll() is None
        time.sleep(0.02)
    os.kill(_children(supervised.pid)[0], signal.SIGKILL)
    said = supervised.communicate(timeout=120)[1]
    assert supervised.returncode == 0, said
    assert "a fault (exit code 137); restarting from" in said and "start 2" in said
    for name in ("generator.safetensors", "training.safetensors"):
        ours, theirs = (load_file(checkpoint.existing(path)[-1] / name) for path in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_name_of_the_supervisors_own_goes_with_a_run_that_is_refused(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--max-restarts", "1", "--batch", "9", "--accumulation", "2"]
    refused = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "--batch: was 9" in refused.stderr
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_whose_reader_goes_saves_and_stops(tmp_path: Path) -> None:
    """As `| head` does, or a launcher that was killed: nothing goes on unwatched, and nothing is lost."""
    run = tmp_path / "run"
    job = subprocess.Popen([sys.executable, str(SCRIPT), *FLAGS, "--kimg", "1000", "--out", str(run)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert job.stdout is not None
    while "img/s" not in job.stdout.readline():
        assert job.poll() is None
    job.stdout.close()
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 0 and "Traceback" not in said, said
    assert "stopped by SIGTERM" in (run / "logs" / "rank-0000.log").read_text()
    checkpoint.read(run, "--resume")


def test_what_would_fail_again_is_not_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, str(SCRIPT), *FLAGS, "--batch", "9", "--accumulation", "2", "--max-restarts", "3"]
    done = subprocess.run([*line, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 2 and "start 2" not in done.stderr and "--batch" in done.stderr, done.stderr


def test_hostfile_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two\na slots=2\n\nb slots=1 # small\n")
    assert read_hostfile(file) == {"a": 2, "b": 1}
    for text in ("a\n", "a slots=x\n", "a slots=1\na slots=1\n", ""):
        file.write_text(text)
        with pytest.raises(ArgumentError, match="--hostfile"):
            read_hostfile(file)
    assert train.main([*FLAGS, "--max-restarts", "-1"]) == 2
    assert "--max-restarts" in capsys.readouterr().err


def test_ranks_are_told_their_hosts_in_order() -> None:
    argv = ["--local_rank=2", "--variant", "wgan", "--hosts=fe80::1:2,h2:1", "--job=1a"]
    assert rank_hosts(argv) == ["fe80::1", "fe80::1", "h2"] and rank_hosts([]) == []
    assert train.parse(argv).variant == "wgan"
