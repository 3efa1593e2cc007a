"""Compiles programs in a process of its own, beside training."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from fastgan.ops import qualification
from fastgan.training import torch_settings
from fastgan.training.compiling.build import build
from fastgan.training.compiling.programs import ProgramSpec
from fastgan.utils.files import try_lock
from fastgan.utils.system import cache_folder

_NICE = 10  # training comes first
_ABANDONED_SECONDS = 86400.0


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _run(specs: Sequence[ProgramSpec], device: str, threads: int, implementations: dict[str, Any]) -> None:
    """Body of the process: the programs of `specs`, in order.

    Args:
        specs: what to compile.
        device: where the programs are to run.
        threads: of torch.
        implementations: `qualification.record` of the run. Eager steps here run what it runs; to measure anything
            beside it would tell nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(_NICE)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # of the compiler, whose faults are stored as reasons
        os.dup2(null, stream)
    torch_settings.apply(specs[0].config)
    torch_settings.allow_tf32(specs[0].config.system.precision == "tf32")
    torch.set_num_threads(threads)
    qualification.follow(implementations, torch.device(device))
    folder = cache_folder("programs")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    waited = threading.Event()
    while not try_lock(lock):  # another run compiles, perhaps the same
        waited.wait(1.0)
    for part in folder.glob(".part-*"):  # of a process that was killed
        if time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(part, ignore_errors=True)
    for spec in specs:
        build(spec, torch.device(device))


class ProgramBuilder:
    """A process that compiles programs into the user's cache, one after another.

    Args:
        specs: what to compile, in order.
        device: where the programs are to run.
    """

    def __init__(self, specs: Sequence[ProgramSpec], device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        arguments = (list(specs), str(device), torch.get_num_threads(), qualification.record(device))
        self._process = context.Process(target=_run, args=arguments, daemon=True, name="fastgan-compile")
        self._process.start()

    def failure(self) -> str | None:
        """Why no more programs will come, if the process has ended otherwise than by finishing."""
        code = self._process.exitcode
        return None if code in (None, 0) else f"the process that compiles ended with code {code}"

    def running(self) -> bool:
        """Whether more programs may come."""
        return self._process.is_alive()

    def close(self) -> None:
        """Stop compiling."""
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()
