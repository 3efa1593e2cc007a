"""A run on two hosts to which things happen: its flags, the moments at which they do, and how it must end."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hosts import ROOT, Hosts
from safetensors.torch import load_file

from fastgan import checkpoint

TIMEOUT = 20
FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 1.6 --fade-kimg 0.4 "
    f"--stable-kimg 0.8 --checkpoint-kimg 0.1 --keep 50 --samples 4 --deterministic --threads 1 --timeout {TIMEOUT}"
).split()
GROWS = "kimg-000000.800"
"""The last checkpoint at 4 px: the next step is of 8 px."""

KINDS = ("step", "checkpoint", "growth")


def start(hosts: Hosts, run: Path, *flags: str) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "fastgan" / "train.py"), "--hostfile", str(hosts.hostfile)]
    return hosts.run(0, [*line, *FLAGS, *flags, "--out", str(run)])


def go_on(hosts: Hosts, output: str) -> subprocess.Popen[str]:
    """What the output says to type."""
    said = re.search(r"go on with: (fastgan train .*)", output)
    assert said is not None, output
    return hosts.run(0, shlex.split(said[1]))


def moments(draw: random.Random) -> list[str]:
    """Three: before, in and after the growth; of the outer two one while a checkpoint is written."""
    outer = ["step", "checkpoint"]
    draw.shuffle(outer)
    return [outer[0], "growth", outer[1]]


def _until(job: subprocess.Popen[str], true: Callable[[], bool], every: float) -> None:
    until = time.monotonic() + 120
    while not true():
        assert job.poll() is None and time.monotonic() < until, job.communicate(timeout=60)[0]
        time.sleep(every)


@contextmanager
def moment(hosts: Hosts, job: subprocess.Popen[str], run: Path, draw: random.Random, kind: str) -> Iterator[None]:
    """Wait for a random moment of a kind, in which what is inside happens.

    step: two to four checkpoints from now, as one may be on its way while a job ends, and somewhat into the steps
    after. checkpoint: as long from now, while one is being written: the rank that writes is stopped in it
    until what is inside has happened. growth: while networks and engines are rebuilt, or in the fade's first steps.
    """
    if kind == "growth":
        _until(job, lambda: checkpoint.existing(run)[-1:] >= [checkpoint.folder(run) / GROWS], 0.002)
        assert checkpoint.existing(run)[-1].name == GROWS
        time.sleep(draw.random() * 0.15)
        yield
        return
    wanted = len(checkpoint.existing(run)) + draw.randint(2, 4)
    _until(job, lambda: len(checkpoint.existing(run)) >= wanted, 0.01)
    if kind == "step":
        time.sleep(draw.random() / 4)
        yield
        return
    (writer,) = ranks(hosts, 0)

    def stopped_while_it_writes() -> bool:
        if not _writing(run):
            return False
        hosts.kill(writer, signal.SIGSTOP)
        while Path(f"/proc/{writer}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.0005)
        if not (caught := bool(_writing(run))):
            hosts.kill(writer, signal.SIGCONT)
        return caught

    _until(job, stopped_while_it_writes, 0.0003)
    try:
        yield
    finally:
        hosts.kill(writer, signal.SIGCONT)


def _writing(run: Path) -> list[str]:
    return [name for name in os.listdir(checkpoint.folder(run)) if name.startswith(".writing-")]


def ranks(hosts: Hosts, host: int) -> list[int]:
    return [pid for pid, command in hosts.processes(host).items() if "--local_rank=" in command]


def gone(hosts: Hosts, host: int, seconds: float) -> None:
    """No process stays on the host for longer than that."""
    until = time.monotonic() + seconds
    while left := hosts.processes(host):
        assert time.monotonic() < until, left
        time.sleep(0.05)


def finish(hosts: Hosts, job: subprocess.Popen[str], run: Path, whole: Path | None = None) -> str:
    """The output of a job that comes to its end with nothing left running, and as `whole` if that is given."""
    output = job.communicate(timeout=230)[0]
    assert job.returncode == 0, output
    assert "Traceback" not in output, output
    for host in range(hosts.count):
        gone(hosts, host, 5)
    assert sound(run)[-1].name == "kimg-000001.600", output
    if whole is not None:
        for name in ("generator.safetensors", "training.safetensors"):
            ours, theirs = (load_file(checkpoint.existing(path)[-1] / name) for path in (run, whole))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    return output


def sound(run: Path) -> list[Path]:
    """The checkpoints, none of them half-written."""
    for path in checkpoint.existing(run):
        checkpoint.read(path, "--resume")
    return checkpoint.existing(run)
