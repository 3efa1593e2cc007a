"""Faults at random moments while `fastgan train --hostfile` trains on two hosts: messages, exit codes and results.

Every run ends bit-identical to one without a fault, whether it restarts by itself or is resumed by hand.
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
from faults import KINDS, TIMEOUT, assert_no_process, finish, moment, moments, ranks, resume, start, valid_checkpoints
from hosts import Hosts

from fastgan import checkpoint

MakeHosts = Callable[..., Hosts]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", ["rank", "host"])
def test_dead_rank_or_host_costs_a_restart(
    hosts: Hosts, reference: Path, run: Path, draw: random.Random, fault: str
) -> None:
    job = start(hosts, run, "--max-restarts", "3")
    for kind in moments(draw):
        with moment(hosts, job, run, draw, kind):
            if fault == "rank":
                hosts.kill(draw.choice(ranks(hosts, 0) + ranks(hosts, 1)))
            else:
                hosts.crash(1)
                hosts.boot(1)
    output = finish(hosts, job, run, reference)
    assert "start 4" in output, output
    reports = re.findall(
        r"fastgan: rank (\d) on (h\d): (.*?); the last checkpoint is (\S+); resume with --resume", output
    )
    assert len(reports) == 3 and all(what == "its connection closed: the process died" for _, _, what, _ in reports), (
        output
    )
    assert all(host == f"h{int(rank) + 1}" for rank, host, _, _ in reports)
    assert all(Path(good) in checkpoint.existing(run) for _, _, _, good in reports)


@pytest.mark.parametrize("kind", KINDS)
def test_death_of_the_first_host_leaves_no_rank(
    hosts: Hosts, reference: Path, run: Path, draw: random.Random, kind: str
) -> None:
    """The launcher and the supervisor die with it."""
    job = start(hosts, run, "--max-restarts", "1")
    with moment(hosts, job, run, draw, kind):
        hosts.crash(0)
    assert_no_process(hosts, 1, TIMEOUT)
    valid_checkpoints(run)
    hosts.boot(0)
    finish(hosts, start(hosts, run, "--max-restarts", "1", "--resume", "auto"), run, reference)


def test_link_down_for_five_seconds_is_no_fault(hosts: Hosts, reference: Path, run: Path, draw: random.Random) -> None:
    job = start(hosts, run)
    for kind in moments(draw):
        host = draw.randrange(2)
        with moment(hosts, job, run, draw, kind):
            hosts.link(host, up=False)
        time.sleep(5)
        hosts.link(host, up=True)
    assert "start 2" not in finish(hosts, job, run, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_slow_link_that_loses_packets_is_no_fault(
    hosts: Hosts, reference: Path, run: Path, draw: random.Random, kind: str
) -> None:
    job = start(hosts, run)
    with moment(hosts, job, run, draw, kind):
        hosts.slow(1, delay=0.1, loss=0.01)
    time.sleep(TIMEOUT + 5)  # longer than a rank may be silent
    assert len(ranks(hosts, 0) + ranks(hosts, 1)) == 2
    hosts.fast(1)
    assert "start 2" not in finish(hosts, job, run, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_host_behind_a_dead_link_is_named(
    hosts: Hosts, reference: Path, run: Path, draw: random.Random, kind: str
) -> None:
    job = start(hosts, run, "--max-restarts", "1")
    with moment(hosts, job, run, draw, kind):
        hosts.link(1, up=False)
    assert_no_process(hosts, 1, TIMEOUT)
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 75 and "Traceback" not in output, output
    assert re.search(r"h1: fastgan: rank 1 on h2: no heartbeat for 1\d s; the last checkpoint is \S+", output), output
    assert "giving up: no answer over ssh from h2, and 2 hosts are needed" in output
    assert hosts.processes(0) == {}
    valid_checkpoints(run)
    hosts.link(1, up=True)
    finish(hosts, resume(hosts, output), run, reference)


def test_min_nodes_restarts_on_fewer_hosts(hosts: Hosts, run: Path, draw: random.Random) -> None:
    job = start(hosts, run, "--max-restarts", "1", "--min-nodes", "1")
    with moment(hosts, job, run, draw, draw.choice(KINDS)):
        hosts.link(1, up=False)
    output = finish(hosts, job, run)
    assert "starting without h2: no answer over ssh" in output and "--accumulation 2" in output, output


@pytest.mark.parametrize("kind", KINDS)
def test_full_disk_stops_the_run_with_its_last_checkpoint(
    make_hosts: MakeHosts, reference: Path, tmp_path: Path, draw: random.Random, kind: str
) -> None:
    hosts = make_hosts(2, disk_mb=16)
    run, filling = hosts.disk / "run", hosts.disk / "filling"
    job = start(hosts, run, "--max-restarts", "1")
    # Half of the time there is room for a part of what is written next.
    room = draw.choice([0, draw.randrange(100_000)])
    with moment(hosts, job, run, draw, kind):
        with pytest.raises(OSError, match="No space left"), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filling, filling.stat().st_size - room)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 2 and "Traceback" not in output and "start 2" not in output, output
    # If a checkpoint did not fit, every rank reports it; another file of rank 0 reaches the others as its verdict.
    errors = [line for line in output.splitlines() if "fastgan: " in line and f"--out '{run}': " in line]
    assert {line[:3] for line in errors} == {"h1:", "h2:"}, output
    for line in errors:
        assert "could not be written" in line and "No space left" in line and "kimg-" in line, output
    for host in range(2):
        assert_no_process(hosts, host, 5)
    valid_checkpoints(run)
    filling.unlink()
    finish(hosts, start(hosts, run, "--resume", str(run)), run, reference)
    hosts.close()


@pytest.mark.parametrize(
    ("target", "kind"), [*(("all", kind) for kind in KINDS), ("supervisor", "step"), ("rank", "growth")]
)
def test_sigterm_saves_and_leaves_no_process(
    hosts: Hosts, reference: Path, run: Path, draw: random.Random, target: str, kind: str
) -> None:
    """As a scheduler sends it before it takes the hosts."""
    job = start(hosts, run, "--max-restarts", "1")
    with moment(hosts, job, run, draw, kind):
        before = valid_checkpoints(run)[-1]
        if target == "rank":
            targets = ranks(hosts, 1)
        else:
            processes = [*hosts.processes(1).items(), *hosts.processes(0).items()]
            targets = [pid for pid, command in processes if target == "all" or "train.py --hostfile" in command]
        assert targets
        for pid in targets:
            hosts.kill(pid, signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and "Traceback" not in output and "start 2" not in output, output
    for host in range(2):
        assert_no_process(hosts, host, 5 if target == "rank" else 1)
    assert valid_checkpoints(run)[-1] > before
    message = (
        "stopped by SIGTERM; resume with: fastgan train --hostfile" if target == "all" else "stopped by SIGTERM at"
    )
    assert message in output, output  # with "all", the launcher, which forwards the ranks' output, got the signal too
    finish(hosts, start(hosts, run, "--resume", str(run)), run, reference)


@pytest.mark.parametrize("fault", ["host", "host", "host", "rank", "link"])
def test_host_lost_before_the_ranks_have_met(
    hosts: Hosts, reference: Path, run: Path, draw: random.Random, fault: str
) -> None:
    """It costs the timeout and the 30 s by which a host may start later than another."""
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
        assert time.monotonic() - began < TIMEOUT + 30 + 30, "ranks still wait"  # a rank waits from its own start
        time.sleep(0.1)
    print(f"ended {time.monotonic() - began:.0f} s after the fault")
    hosts.link(1, up=True)
    output = finish(hosts, job, run, reference)
    assert "start 2" in output, output
    reports = re.findall(
        r"rank 1 on h2: (?:it did not connect within 5[01] s|its connection closed|no heartbeat)", output
    )
    assert reports or "cannot reach the other ranks" in output, output
