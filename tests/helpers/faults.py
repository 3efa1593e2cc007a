"""A run on two hosts with faults: its flags, the moments of the faults, and how it must end."""

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
"""The last checkpoint at 4 px; the next step has 8 px."""

KINDS = ("step", "checkpoint", "growth")


def start(hosts: Hosts, run: Path, *flags: str) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "fastgan" / "train.py"), "--hostfile", str(hosts.hostfile)]
    return hosts.run(0, [*line, *FLAGS, *flags, "--out", str(run)])


def resume(hosts: Hosts, output: str) -> subprocess.Popen[str]:
    """Run the command that the output suggests."""
    command = re.search(r"resume with: (fastgan train .*)", output)
    assert command is not None, output
    return hosts.run(0, shlex.split(command[1]))


def moments(draw: random.Random) -> list[str]:
    """Three moments: before, in and after the growth; one of the outer two is while a checkpoint is written."""
    outer = ["step", "checkpoint"]
    draw.shuffle(outer)
    return [outer[0], "growth", outer[1]]


def _until(job: subprocess.Popen[str], condition: Callable[[], bool], every: float) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert job.poll() is None and time.monotonic() < until, job.communicate(timeout=60)[0]
        time.sleep(every)


@contextmanager
def moment(hosts: Hosts, job: subprocess.Popen[str], run: Path, draw: random.Random, kind: str) -> Iterator[None]:
    """Context that starts at a random moment.

    Args:
        hosts: of the job.
        job: the run's process.
        run: the run directory.
        draw: random numbers.
        kind: "step": after two to four more checkpoints (one may be in progress while a job ends) and up to 0.25 s.
            "checkpoint": after as many, while the next one is written; the writing rank is stopped in the context.
            "growth": while networks and engines are rebuilt, or in the first steps of the fade-in.
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


def assert_no_process(hosts: Hosts, host: int, seconds: float) -> None:
    """Assert that all processes of the host end within `seconds`."""
    until = time.monotonic() + seconds
    while left := hosts.processes(host):
        assert time.monotonic() < until, left
        time.sleep(0.05)


def finish(hosts: Hosts, job: subprocess.Popen[str], run: Path, reference: Path | None = None) -> str:
    """Output of a job that finishes the run, leaves no process, and ends with the weights of `reference` if given."""
    output = job.communicate(timeout=230)[0]
    assert job.returncode == 0, output
    assert "Traceback" not in output, output
    for host in range(hosts.count):
        assert_no_process(hosts, host, 5)
    assert valid_checkpoints(run)[-1].name == "kimg-000001.600", output
    if reference is not None:
        for name in ("generator.safetensors", "training.safetensors"):
            ours, theirs = (load_file(checkpoint.existing(path)[-1] / name) for path in (run, reference))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    return output


def valid_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints; asserts that all can be read."""
    for path in checkpoint.existing(run):
        checkpoint.read(path, "--resume")
    return checkpoint.existing(run)
