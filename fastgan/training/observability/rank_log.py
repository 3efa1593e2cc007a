"""The log file of each rank, RUN/logs/rank-0003.log.

It takes what is logged to `LOGGER`, and warnings of this process and its libraries in addition to where they went
before. A rank that was killed has no last line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgan import __version__
from fastgan.utils.files import append_regular
from fastgan.utils.system import device_name

if TYPE_CHECKING:
    from fastgan.training.distributed.process_group import ProcessGroup

LOGGER = logging.getLogger("fastgan.rank")


class _File(logging.FileHandler):
    """Reports a write error, such as a full disk, once on stderr and does not raise it."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"fastgan: {self.baseFilename}: {sys.exc_info()[1]}; its next lines may be missing", file=sys.stderr)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed; "not installed" if DeepSpeed is not."""
    try:
        deepspeed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        deepspeed = "not installed"
    return {"fastgan": __version__, "torch": str(torch.__version__), "deepspeed": deepspeed}


@contextlib.contextmanager
def rank_log(run: Path, world: ProcessGroup) -> Iterator[None]:
    """Context in which `LOGGER` writes to the run directory.

    The first line identifies the rank; an exception that leaves the context is logged as the last one.

    Args:
        run: the run directory.
        world: this process among the ranks.
    """
    path = run / "logs" / f"rank-{world.rank:04d}.log"
    handler: logging.Handler
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_regular(path, "")  # a named pipe would block
        handler = _File(path, encoding="utf-8")
    except OSError as error:
        print(f"fastgan: rank {world.rank} cannot write its log: {error}", file=sys.stderr, flush=True)
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # Libraries log through the root logger. Ours does not propagate to it, or every rank would print its lines.
    root, level, propagate = logging.getLogger(), LOGGER.level, LOGGER.propagate
    handler.addFilter(lambda record: record.name == LOGGER.name or record.levelno >= logging.WARNING)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    for logger in (LOGGER, root):
        logger.addHandler(handler)
    showwarning = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any, **named: Any) -> None:
        LOGGER.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        showwarning(message, category, filename, lineno, *rest, **named)

    warnings.showwarning = show
    LOGGER.info(
        "rank %d of %d on %s, process %d, %s (%s), engine %s; %s, Python %s",
        world.rank,
        world.size,
        socket.gethostname(),
        os.getpid(),
        world.device,
        device_name(world.device),
        world.engine,
        ", ".join(f"{package} {version}" for package, version in versions().items()),
        platform.python_version(),
    )
    try:
        yield
    except BaseException as error:
        LOGGER.error("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        warnings.showwarning = showwarning
        for logger in (LOGGER, root):
            logger.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
        handler.close()
