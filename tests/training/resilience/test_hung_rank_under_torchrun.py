"""torchrun kills all ranks as soon as one ends: the hung one must be named before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FLAGS = (
    "--variant lsgan --width 4 --latent 8 --resolution 8 --batch 8 --kimg 1000 --log-kimg 0.064 --checkpoint-kimg 0.64 "
    "--samples 4 --threads 1 --device cpu --timeout 8 --engine torch"
).split()
SCRIPT = Path(__file__).parents[3] / "fastgan" / "train.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are told apart by Linux' /proc"),
]


def _ranks_of(launcher: int) -> dict[int, int]:
    """Process of each rank below the launcher."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        numbers = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
        if parent == launcher and numbers:
            ranks[numbers[0]] = int(folder.name)
    return ranks


@pytest.mark.parametrize("hung", [0, 1])
def test_a_hung_rank_is_named(tmp_path: Path, hung: int) -> None:
    run = tmp_path / "run"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    job = subprocess.Popen(
        [*line, *FLAGS, "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 120
        while not any((run / "checkpoints").glob("kimg-*")):
            assert job.poll() is None and time.monotonic() < until, job.communicate(timeout=60)[0]
            time.sleep(0.1)
        ranks = _ranks_of(job.pid)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[hung], signal.SIGSTOP)
        began = time.monotonic()
        other = Path(f"/proc/{ranks[1 - hung]}/stat")
        while other.exists() and ") Z " not in other.read_text():
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        os.kill(ranks[hung], signal.SIGCONT)  # else torchrun waits half a minute for it before it kills it
        output = job.communicate(timeout=120)[0]
    finally:
        left = _ranks_of(job.pid)
        job.kill()
        for process in left.values():
            os.kill(process, signal.SIGKILL)
    assert job.returncode != 0
    (named,) = [text for text in output.splitlines() if text.startswith(f"fastgan: rank {hung} on ")]
    assert "no heartbeat for" in named and "the last checkpoint is " in named and "resume with --resume" in named
    assert "Traceback" not in output.partition("torch/distributed")[0], output
