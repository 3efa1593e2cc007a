"""Faults while `fastgan train --hostfile` trains on two hosts, at random moments: what it says, and what it ends with.

Each run ends bit-identical to one that nothing happened to, whether it restarts by itself or is gone on with by hand.
`FASTGAN_FAULT_SEED=N pytest ...` repeats the moments of a run that printed `seed N`.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
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

TIMEOUT = 20
FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 1.6 --checkpoint-kimg 0.1 "
    f"--keep 50 --samples 4 --deterministic --threads 1 --timeout {TIMEOUT}"
).split()
MakeHosts = Callable[..., Hosts]

pytestmark = pytest.mark.slow


@pytest.fixture
def draw() -> random.Random:
    seed = int(os.environ.get("FASTGAN_FAULT_SEED", random.randrange(10**6)))
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "fastgan" / "train.py")]
    subprocess.run([*line, *FLAGS, "--out", str(run)], stdout=subprocess.DEVNULL, check=True, timeout=200)
    return run


def _start(hosts: Hosts, run: Path, *flags: str) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "fastgan" / "train.py"), "--hostfile", str(hosts.hostfile)]
    return hosts.run(0, [*line, *FLAGS, *flags, "--out", str(run)])


def _go_on(hosts: Hosts, output: str) -> subprocess.Popen[str]:
    """What the output says to type."""
    said = re.search(r"go on with: (fastgan train .*)", output)
    assert said is not None, output
    return hosts.run(0, shlex.split(said[1]))


def _moment(job: subprocess.Popen[str], run: Path, draw: random.Random, first: int = 1, last: int = 8) -> None:
    """Wait for `first` to `last` checkpoints more than there are, and somewhat into the steps after."""
    wanted = len(checkpoint.existing(run)) + draw.randint(first, last)
    until = time.monotonic() + 120
    while len(checkpoint.existing(run)) < wanted:
        assert job.poll() is None and time.monotonic() < until, job.communicate(timeout=60)[0]
        time.sleep(0.02)
    time.sleep(draw.random() / 4)


def _ranks(hosts: Hosts, host: int) -> list[int]:
    return [pid for pid, command in hosts.processes(host).items() if "--local_rank=" in command]


def _gone(hosts: Hosts, host: int, seconds: float) -> None:
    """No process stays on the host for longer than that."""
    until = time.monotonic() + seconds
    while left := hosts.processes(host):
        assert time.monotonic() < until, left
        time.sleep(0.05)


def _finish(hosts: Hosts, job: subprocess.Popen[str], run: Path, whole: Path | None = None) -> str:
    """The output of a job that comes to its end with nothing left running, and as `whole` if that is given."""
    output = job.communicate(timeout=230)[0]
    assert job.returncode == 0, output
    assert "Traceback" not in output, output
    for host in range(hosts.count):
        _gone(hosts, host, 5)
    assert _sound(run)[-1].name == "kimg-000001.600", output
    if whole is not None:
        for name in ("generator.safetensors", "training.safetensors"):
            ours, theirs = (load_file(checkpoint.existing(path)[-1] / name) for path in (run, whole))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    return output


def _sound(run: Path) -> list[Path]:
    """The checkpoints, none of them half-written."""
    for path in checkpoint.existing(run):
        checkpoint.read(path, "--resume")
    return checkpoint.existing(run)


@pytest.mark.parametrize("fault", ["rank", "host"])
def test_a_rank_or_host_that_dies_costs_a_restart(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, fault: str
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run, "--max-restarts", "2")
    for _ in range(2):
        _moment(job, run, draw, 2, 4)  # of the new job: a checkpoint may have been on its way when the old one ended
        if fault == "rank":
            hosts.kill(draw.choice(_ranks(hosts, 0) + _ranks(hosts, 1)))
        else:
            hosts.crash(1)
            hosts.boot(1)
    output = _finish(hosts, job, run, whole)
    assert "start 3" in output, output
    said = re.findall(r"fastgan: rank (\d) on (h\d): (.*?); the last checkpoint is (\S+); go on with --resume", output)
    assert len(said) == 2 and all(what == "its connection closed: the process died" for _, _, what, _ in said), output
    assert all(host == f"h{int(rank) + 1}" for rank, host, _, _ in said)
    assert all(Path(good) in checkpoint.existing(run) for _, _, _, good in said)
    hosts.close()


def test_the_first_host_that_dies_leaves_no_rank_behind(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random
) -> None:
    """With it go the launcher and who would restart it."""
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run, "--max-restarts", "1")
    _moment(job, run, draw)
    hosts.crash(0)
    _gone(hosts, 1, TIMEOUT)
    _sound(run)
    hosts.boot(0)
    _finish(hosts, _start(hosts, run, "--max-restarts", "1", "--resume", "auto"), run, whole)
    hosts.close()


def test_a_link_that_is_down_for_five_seconds_is_no_fault(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run)
    for _ in range(3):
        _moment(job, run, draw, 1, 4)
        host = draw.randrange(2)
        hosts.link(host, up=False)
        time.sleep(5)
        hosts.link(host, up=True)
    assert "start 2" not in _finish(hosts, job, run, whole)
    hosts.close()


def test_a_link_that_is_slow_and_loses_packets_is_no_fault(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run)
    for _ in range(2):
        _moment(job, run, draw, 1, 4)
        hosts.slow(1, delay=0.1, loss=0.01)
        time.sleep(TIMEOUT + 5)  # longer than a rank may be silent
        assert len(_ranks(hosts, 0) + _ranks(hosts, 1)) == 2
        hosts.fast(1)
    assert "start 2" not in _finish(hosts, job, run, whole)
    hosts.close()


@pytest.mark.parametrize("moment", range(2))
def test_a_link_that_is_down_for_good_is_named(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, moment: int
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run, "--max-restarts", "1")
    _moment(job, run, draw)
    hosts.link(1, up=False)
    _gone(hosts, 1, TIMEOUT + 5)
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 75 and "Traceback" not in output, output
    assert re.search(r"h1: fastgan: rank 1 on h2: no sign of life for 1\d s; the last checkpoint is \S+", output), (
        output
    )
    assert "given up: no answer over ssh from h2, and 2 hosts are needed" in output
    assert hosts.processes(0) == {}
    _sound(run)
    hosts.link(1, up=True)
    _finish(hosts, _go_on(hosts, output), run, whole)
    hosts.close()


def test_fewer_hosts_go_on_where_that_is_allowed(make_hosts: MakeHosts, tmp_path: Path, draw: random.Random) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run, "--max-restarts", "1", "--min-nodes", "1")
    _moment(job, run, draw)
    hosts.link(1, up=False)
    output = _finish(hosts, job, run)
    assert "without h2: no answer over ssh" in output and "--accumulation 2 keeps the batch" in output, output
    hosts.close()


@pytest.mark.parametrize("moment", range(2))
def test_a_full_disk_stops_the_run_with_its_last_checkpoint(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, moment: int
) -> None:
    hosts = make_hosts(2, disk_mb=16)
    run, filling = hosts.disk / "run", hosts.disk / "filling"
    job = _start(hosts, run, "--max-restarts", "1")
    _moment(job, run, draw)
    # At the second moment there is room left for part of what is written next.
    room = draw.randrange(100_000) if moment else 0
    with pytest.raises(OSError, match="No space left"), filling.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filling, filling.stat().st_size - room)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 2 and "Traceback" not in output and "start 2" not in output, output
    # If it was a checkpoint that found no room, each rank says so; of another file the others hear from the first.
    said = [line for line in output.splitlines() if "fastgan: " in line and f"--out: was '{run}'; " in line]
    assert {line[:3] for line in said} == {"h1:", "h2:"}, output
    for line in said:
        assert "could not be written" in line and "No space left" in line and "kimg-" in line, output
    for host in range(2):
        _gone(hosts, host, 5)
    _sound(run)
    filling.unlink()
    _finish(hosts, _start(hosts, run, "--resume", str(run)), run, whole)
    hosts.close()


@pytest.mark.parametrize("whom", ["all", "supervisor", "rank"])
def test_sigterm_saves_and_leaves_nothing_running(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, whom: str
) -> None:
    """As a scheduler sends it before it takes the hosts away."""
    hosts, run = make_hosts(2), tmp_path / "run"
    job = _start(hosts, run, "--max-restarts", "1")
    _moment(job, run, draw)
    before = _sound(run)[-1]
    if whom == "rank":
        targets = _ranks(hosts, 1)
    else:
        found = [*hosts.processes(1).items(), *hosts.processes(0).items()]
        targets = [pid for pid, command in found if whom == "all" or "train.py --hostfile" in command]
    assert targets
    for pid in targets:
        hosts.kill(pid, signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and "Traceback" not in output and "start 2" not in output, output
    for host in range(2):
        _gone(hosts, host, 5 if whom == "rank" else 1)
    assert _sound(run)[-1] > before
    said = "stopped by SIGTERM; go on with: fastgan train --hostfile" if whom == "all" else "stopped by SIGTERM at"
    assert said in output, output  # the launcher, which passes on what ranks say, had the signal too
    _finish(hosts, _start(hosts, run, "--resume", str(run)), run, whole)
    hosts.close()
