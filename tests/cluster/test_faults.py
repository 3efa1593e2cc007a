"""Faults of ranks and hosts under `fastgan train --hostfile --max-restarts`: the run ends as an undisturbed one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosts import ROOT, Hosts
from safetensors.torch import load_file

from fastgan import checkpoint

FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 1.2 --checkpoint-kimg 0.1 "
    "--keep 50 --samples 4 --deterministic --threads 1 --timeout 20"
).split()


def _start(hosts: Hosts, run: Path) -> subprocess.Popen[str]:
    line = [
        sys.executable,
        str(ROOT / "fastgan" / "train.py"),
        "--hostfile",
        str(hosts.hostfile),
        "--max-restarts",
        "2",
    ]
    return hosts.run(0, [*line, *FLAGS, "--out", str(run)])


def _disturb(hosts: Hosts, fault: str) -> None:
    if fault == "rank":
        hosts.kill(next(p for p, c in hosts.processes(1).items() if "train.py" in c and "launcher" not in c))
    else:
        hosts.crash(1)
        hosts.boot(1)


@pytest.fixture(scope="module")
def whole(make_hosts: Callable[..., Hosts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    hosts, run = make_hosts(2), tmp_path_factory.mktemp("whole") / "run"
    job = _start(hosts, run)
    assert job.communicate(timeout=200)[0] and job.returncode == 0
    hosts.close()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rank", "host"])
def test_disturbed_run_ends_bit_identical(
    make_hosts: Callable[..., Hosts], whole: Path, tmp_path: Path, fault: str
) -> None:
    seed = random.randrange(1000)
    print("seed", seed)
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run)
    after = random.Random(seed).randint(1, 8)
    while len(checkpoint.existing(run)) < after:
        assert job.poll() is None
        time.sleep(0.02)
    _disturb(hosts, fault)
    output = job.communicate(timeout=250)[0]
    assert job.returncode == 0, output
    assert "fastgan: rank 1 on h2: its connection closed" in output and "start 2" in output, output
    assert "Traceback" not in output
    for name in ("generator.safetensors", "training.safetensors"):
        ours, theirs = (load_file(checkpoint.existing(path)[-1] / name) for path in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [hosts.processes(host) for host in range(2)] == [{}, {}]
    hosts.close()
