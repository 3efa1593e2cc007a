"""Faults while `fastgan train --hostfile` trains on two hosts, at random moments: what it says, and what it ends with.

Each run ends bit-identical to one that nothing happened to, whether it restarts by itself or is gone on with by hand.
`FASTGAN_FAULT_SEED=N pytest ...` repeats the moments of a run that printed `seed N`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import KINDS, TIMEOUT, finish, go_on, gone, moment, moments, ranks, sound, start
from hosts import Hosts

from fastgan import checkpoint

MakeHosts = Callable[..., Hosts]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", ["rank", "host"])
def test_a_rank_or_host_that_dies_costs_a_restart(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, fault: str
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run, "--max-restarts", "3")
    for kind in moments(draw):
        with moment(hosts, job, run, draw, kind):
            if fault == "rank":
                hosts.kill(draw.choice(ranks(hosts, 0) + ranks(hosts, 1)))
            else:
                hosts.crash(1)
                hosts.boot(1)
    output = finish(hosts, job, run, whole)
    assert "start 4" in output, output
    said = re.findall(r"fastgan: rank (\d) on (h\d): (.*?); the last checkpoint is (\S+); go on with --resume", output)
    assert len(said) == 3 and all(what == "its connection closed: the process died" for _, _, what, _ in said), output
    assert all(host == f"h{int(rank) + 1}" for rank, host, _, _ in said)
    assert all(Path(good) in checkpoint.existing(run) for _, _, _, good in said)
    hosts.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_host_that_dies_leaves_no_rank_behind(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, kind: str
) -> None:
    """With it go the launcher and who would restart it."""
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run, "--max-restarts", "1")
    with moment(hosts, job, run, draw, kind):
        hosts.crash(0)
    gone(hosts, 1, TIMEOUT)
    sound(run)
    hosts.boot(0)
    finish(hosts, start(hosts, run, "--max-restarts", "1", "--resume", "auto"), run, whole)
    hosts.close()


def test_a_link_that_is_down_for_five_seconds_is_no_fault(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run)
    for kind in moments(draw):
        host = draw.randrange(2)
        with moment(hosts, job, run, draw, kind):
            hosts.link(host, up=False)
        time.sleep(5)
        hosts.link(host, up=True)
    assert "start 2" not in finish(hosts, job, run, whole)
    hosts.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_is_slow_and_loses_packets_is_no_fault(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, kind: str
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run)
    with moment(hosts, job, run, draw, kind):
        hosts.slow(1, delay=0.1, loss=0.01)
    time.sleep(TIMEOUT + 5)  # longer than a rank may be silent
    assert len(ranks(hosts, 0) + ranks(hosts, 1)) == 2
    hosts.fast(1)
    assert "start 2" not in finish(hosts, job, run, whole)
    hosts.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_is_down_for_good_is_named(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, kind: str
) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run, "--max-restarts", "1")
    with moment(hosts, job, run, draw, kind):
        hosts.link(1, up=False)
    gone(hosts, 1, TIMEOUT)
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 75 and "Traceback" not in output, output
    assert re.search(r"h1: fastgan: rank 1 on h2: no sign of life for 1\d s; the last checkpoint is \S+", output), (
        output
    )
    assert "given up: no answer over ssh from h2, and 2 hosts are needed" in output
    assert hosts.processes(0) == {}
    sound(run)
    hosts.link(1, up=True)
    finish(hosts, go_on(hosts, output), run, whole)
    hosts.close()


def test_fewer_hosts_go_on_where_that_is_allowed(make_hosts: MakeHosts, tmp_path: Path, draw: random.Random) -> None:
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run, "--max-restarts", "1", "--min-nodes", "1")
    with moment(hosts, job, run, draw, draw.choice(KINDS)):
        hosts.link(1, up=False)
    output = finish(hosts, job, run)
    assert "without h2: no answer over ssh" in output and "--accumulation 2 keeps the batch" in output, output
    hosts.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_stops_the_run_with_its_last_checkpoint(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, kind: str
) -> None:
    hosts = make_hosts(2, disk_mb=16)
    run, filling = hosts.disk / "run", hosts.disk / "filling"
    job = start(hosts, run, "--max-restarts", "1")
    # Half of the times there is room left for part of what is written next.
    room = draw.choice([0, draw.randrange(100_000)])
    with moment(hosts, job, run, draw, kind):
        with pytest.raises(OSError, match="No space left"), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filling, filling.stat().st_size - room)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 2 and "Traceback" not in output and "start 2" not in output, output
    # If it was a checkpoint that found no room, each rank says so; of another file the others hear from the first.
    said = [line for line in output.splitlines() if "fastgan: " in line and f"--out '{run}': " in line]
    assert {line[:3] for line in said} == {"h1:", "h2:"}, output
    for line in said:
        assert "could not be written" in line and "No space left" in line and "kimg-" in line, output
    for host in range(2):
        gone(hosts, host, 5)
    sound(run)
    filling.unlink()
    finish(hosts, start(hosts, run, "--resume", str(run)), run, whole)
    hosts.close()


@pytest.mark.parametrize(
    ("whom", "kind"), [*(("all", kind) for kind in KINDS), ("supervisor", "step"), ("rank", "growth")]
)
def test_sigterm_saves_and_leaves_nothing_running(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, whom: str, kind: str
) -> None:
    """As a scheduler sends it before it takes the hosts away."""
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run, "--max-restarts", "1")
    with moment(hosts, job, run, draw, kind):
        before = sound(run)[-1]
        if whom == "rank":
            targets = ranks(hosts, 1)
        else:
            found = [*hosts.processes(1).items(), *hosts.processes(0).items()]
            targets = [pid for pid, command in found if whom == "all" or "train.py --hostfile" in command]
        assert targets
        for pid in targets:
            hosts.kill(pid, signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and "Traceback" not in output and "start 2" not in output, output
    for host in range(2):
        gone(hosts, host, 5 if whom == "rank" else 1)
    assert sound(run)[-1] > before
    said = "stopped by SIGTERM; go on with: fastgan train --hostfile" if whom == "all" else "stopped by SIGTERM at"
    assert said in output, output  # the launcher, which passes on what ranks say, had the signal too
    finish(hosts, start(hosts, run, "--resume", str(run)), run, whole)
    hosts.close()


@pytest.mark.parametrize("fault", ["host", "host", "host", "rank", "link"])
def test_a_host_that_is_lost_before_the_ranks_have_met(
    make_hosts: MakeHosts, whole: Path, tmp_path: Path, draw: random.Random, fault: str
) -> None:
    """It costs the timeout, and the 30 s by which a host may start later than another."""
    hosts, run = make_hosts(2), tmp_path / "run"
    job = start(hosts, run, "--max-restarts", "1")
    while not ranks(hosts, 1):
        time.sleep(0.02)
    time.sleep(draw.random() * 3)
    began = time.monotonic()
    if fault == "rank":
        hosts.kill(ranks(hosts, 1)[0])
    elif fault == "host":
        hosts.crash(1)
        hosts.boot(1)
    else:
        hosts.link(1, up=False)
    while ranks(hosts, 0) or (fault == "link" and ranks(hosts, 1)):
        assert time.monotonic() - began < TIMEOUT + 30 + 30, "ranks still wait"  # from its own start on a rank waits
        time.sleep(0.1)
    print(f"ended {time.monotonic() - began:.0f} s after the fault")
    hosts.link(1, up=True)
    output = finish(hosts, job, run, whole)
    assert "start 2" in output, output
    said = re.findall(r"rank 1 on h2: (?:it did not come within 5[01] s|its connection closed|no sign of life)", output)
    assert said or "did not find the other ranks" in output, output
    hosts.close()
