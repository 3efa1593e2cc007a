"""The folder of a run: which one `--out` and `--resume` mean, and that no two processes train in one."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from fastgan import checkpoint
from fastgan.config.variants import VARIANTS
from fastgan.errors import ArgumentError
from fastgan.utils.files import try_lock

LOCK = ".lock"


class RunLocked(ArgumentError):
    """Another process trains in the run."""

    def __reduce__(self) -> tuple[type[RunLocked], tuple[str, object, str]]:
        return RunLocked, (self.argument, self.got, self.problem)


def default(variant: str) -> Path:
    """What a run is called that nobody named."""
    return Path(f"runs/{variant}-{time.strftime('%Y%m%d-%H%M%S')}")


def newest(out: str | None, variant: str) -> Path | None:
    """The run that `--resume auto` means."""
    if out is not None:
        return Path(out) if (Path(out) / "config.yaml").is_file() else None
    longer = tuple(f"{name}-" for name in VARIANTS if name.startswith(f"{variant}-"))  # wgan-gp's are not wgan's
    runs = [path.parent for path in Path("runs").glob(f"{variant}-*/config.yaml")]
    runs = [run for run in runs if not run.name.startswith(longer)]
    return max(runs, key=_trained, default=None)


def _trained(run: Path) -> float:
    """When a run was trained last; its folder's own time is also that of a sample or an export that went there."""
    newest = checkpoint.existing(run)[-1:]
    return (newest[0] / "checkpoint.json" if newest else run / "config.yaml").stat().st_mtime


def of(resume: str) -> Path:
    """The run directory of `--resume`, which may also name a checkpoint inside it."""
    path = Path(resume)
    for run in (path, path.parent.parent):
        if (run / "config.yaml").is_file():
            return run
    raise ArgumentError("--resume", resume, "must be a run directory, a checkpoint in one, or auto")


def check_free(run: Path) -> None:
    """Raises ArgumentError if a new run cannot be begun in `run` because of what is there."""
    if (run / "config.yaml").exists():
        quoted = shlex.quote(str(run))
        raise ArgumentError("--out", str(run), f"it already has a run; go on with --resume {quoted}, or name another")
    if run.exists() and not run.is_dir():
        raise ArgumentError("--out", str(run), "must be a folder")
    for name in ("checkpoints", "metrics.jsonl", "evaluation.jsonl", "samples"):
        left = run / name
        if left.is_file() or (left.is_dir() and any(left.iterdir())):
            # A new run would count old checkpoints among its own, and drop them.
            raise ArgumentError("--out", str(run), f"it holds {name} and no config.yaml; it may be a new folder")


@contextlib.contextmanager
def writable(run: Path) -> Iterator[None]:
    """Around what is written into `run` before training: what the system refuses is told as `--out`'s fault."""
    try:
        yield
    except OSError as error:
        raise ArgumentError("--out", str(run), f"must be a folder that can be written ({error.strerror})") from None


def make(run: Path, named: bool) -> Path:
    """Make the folder of a run; one that was not `named` gets a number where another start had the same name.

    Raises:
        ArgumentError: it cannot be made.
    """
    with writable(run):
        if named:
            run.mkdir(parents=True, exist_ok=True)
            return run
        for number in itertools.count(2):
            try:
                run.mkdir(parents=True)
                return run
            except FileExistsError:
                if not os.path.lexists(run):  # it is a parent that is there and no folder
                    raise
            run = run.with_name(f"{run.name.removesuffix(f'.{number - 1}')}.{number}")
    raise AssertionError


@contextlib.contextmanager
def locked(run: Path, flag: str, patience: float = 0.0) -> Iterator[None]:
    """Hold `run` against every other process that would train in it, until its end or this one's, a kill included.

    A process that this one starts does not inherit the lock: the file is closed when it begins another program.

    Args:
        flag: what named the run.
        patience: seconds to wait for the one that holds it.

    Raises:
        RunLocked: another process holds it. ArgumentError: the file cannot be written.
    """
    with writable(run):
        stream = (run / LOCK).open("a")
    with stream:
        deadline, told = time.monotonic() + patience, False
        while not try_lock(stream.fileno()):
            if time.monotonic() >= deadline:
                raise RunLocked(flag, str(run), "another process trains there; it may be given once that has ended")
            if not told:
                print(f"another process trains in {run}; waiting {patience:g} s for its end", flush=True)
                told = True
            time.sleep(0.5)
        yield
