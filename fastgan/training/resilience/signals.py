"""SIGINT, SIGTERM, and nobody left to read what is said: requests to stop after the step."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist

from fastgan.training.observability.rank_log import LOGGER

if TYPE_CHECKING:
    from fastgan.training.distributed.process_group import ProcessGroup

_READER_GONE = threading.Event()


class _Outlet:
    """A text stream that is not broken by its reader: what nobody reads is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe's other end, or a terminal
                raise
            # What the stream still holds is written again at its end, and must find a place then.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not _READER_GONE.is_set():
                _READER_GONE.set()
                LOGGER.warning("nobody reads this process's output any more: it stops after the step")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def readers_may_go() -> Iterator[None]:
    """Inside, a pipe or terminal under stdout or stderr that is gone is a request to stop, no error in mid-step.

    So a launcher that is killed, and whose ranks only lose their output, leaves no run behind that nobody watches.
    """
    _READER_GONE.clear()
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Outlet(out), _Outlet(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


class SignalHandler:
    """SIGINT and SIGTERM as a request to stop after the step, agreed on by all ranks without stalling any.

    Each step's agreement is collected at the next one, so that its all-reduce (over gloo, of one host integer)
    overlaps the step. A second SIGINT interrupts at once.
    """

    def __init__(self, world: ProcessGroup, timeout: float) -> None:
        self.signal: int | None = None
        self._stopping = False
        self._group: Any = None
        self._heartbeat = world.heartbeat
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: Any = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._work is not None and kind is None:
            self._work.wait()
        for number, handler in self._before.items():
            # A launcher repeats its signal; what follows one that was obeyed must not cut the way out short.
            signal.signal(number, signal.SIG_IGN if self._stopping or self.signal is not None else handler)

    def _receive(self, number: int, _: object) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self) -> bool:
        """Whether the ranks agreed at the step before to stop now; called by all at every step."""
        asked = self.signal is not None or _READER_GONE.is_set()
        if self._group is None:
            self._stopping = asked
            return asked
        stop = False
        if self._work is not None:
            self._work.wait()
            if self._heartbeat is not None:
                self._heartbeat.together()
            stop = self._stopping = bool(self._flag.item())
        self._flag.fill_(int(asked))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop
