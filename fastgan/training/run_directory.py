"""The folder of a run: which one `--out` and `--resume` name, and the lock that keeps it to one process."""

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
from fastgan.utils.files import open_appending, try_lock

LOCK = ".lock"


class RunLocked(ArgumentError):
    """Another process trains in the run."""

    def __reduce__(self) -> tuple[type[RunLocked], tuple[str, object, str]]:
        return RunLocked, (self.argument, self.got, self.problem)


def default(variant: str) -> Path:
    """The name of a run without `--out`."""
    return Path(f"runs/{variant}-{time.strftime('%Y%m%d-%H%M%S')}")


def newest(out: str | None, variant: str | None) -> Path | None:
    """The run of `--resume auto`, if there is one; a `variant` of None: of any."""
    if out is not None:
        return Path(out) if (Path(out) / "config.yaml").is_file() else None
    longer = tuple(f"{name}-" for name in VARIANTS if name.startswith(f"{variant}-"))  # wgan-gp's are not wgan's
    runs = [path.parent for path in Path("runs").glob(f"{variant or '*'}-*/config.yaml")]
    runs = [run for run in runs if not run.name.startswith(longer)]
    return max(runs, key=_trained, default=None)


def _trained(run: Path) -> float:
    """When a run was trained last. The time of its folder would be that of a sample or an export too."""
    newest = checkpoint.existing(run)[-1:]
    return (newest[0] / "checkpoint.json" if newest else run / "config.yaml").stat().st_mtime


def of(resume: str) -> Path:
    """The run directory of `--resume`, which may also name a checkpoint inside it.

    Raises:
        ArgumentError: there is no run.
    """
    path = Path(resume)
    for run in (path, path.parent.parent):
        if (run / "config.yaml").is_file():
            return run
    raise ArgumentError("--resume", resume, "must be a run directory, a checkpoint in one, or auto")


def check_free(run: Path) -> None:
    """Refuse a folder for a new run that holds another one.

    Raises:
        ArgumentError: it has a run, what is left of one, or is a file.
    """
    if (run / "config.yaml").exists():
        quoted = shlex.quote(str(run))
        raise ArgumentError(
            "--out", str(run), f"it already has a run; resume it with --resume {quoted}, or choose another folder"
        )
    if run.exists() and not run.is_dir():
        raise ArgumentError("--out", str(run), "must be a folder")
    for name in ("checkpoints", "metrics.jsonl", "evaluation.jsonl", "samples"):
        left = run / name
        if left.is_file() or (left.is_dir() and any(left.iterdir())):
            # A new run would count old checkpoints among its own, and delete them.
            raise ArgumentError("--out", str(run), f"it holds {name} and no config.yaml; choose a new folder")


@contextlib.contextmanager
def writable(run: Path) -> Iterator[None]:
    """Report errors of the system while `run` is written to, before training, as an error of `--out`."""
    try:
        yield
    except OSError as error:
        raise ArgumentError("--out", str(run), f"must be a folder that can be written ({error.strerror})") from None


def make(run: Path, named: bool) -> Path:
    """Make the folder of a run. One that was not `named` gets a number where its name is taken.

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
                if not os.path.lexists(run):  # a parent is a file
                    raise
            run = run.with_name(f"{run.name.removesuffix(f'.{number - 1}')}.{number}")
    raise AssertionError


@contextlib.contextmanager
def locked(run: Path, flag: str, patience: float = 0.0) -> Iterator[None]:
    """Lock `run` for this process, until the end of the block or of the process, by a kill too.

    Child processes do not inherit the lock: the file is closed when they start another program.

    Args:
        run: the folder.
        flag: what the user named it by.
        patience: seconds to wait for another process to release it.

    Raises:
        RunLocked: another process holds the lock.
        ArgumentError: the lock file cannot be written.
    """
    with writable(run):
        stream = open_appending(run / LOCK)
    with stream:
        deadline, told = time.monotonic() + patience, False
        while not try_lock(stream.fileno()):
            if time.monotonic() >= deadline:
                raise RunLocked(flag, str(run), "another process trains in it; wait for its end")
            if not told:
                print(f"another process trains in {run}; waiting at most {patience:g} s for its end", flush=True)
                told = True
            time.sleep(0.5)
        yield
