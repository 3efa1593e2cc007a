"""Requests to stop after the current step: SIGINT, SIGTERM, SIGHUP, and an output that its reader has closed."""

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

_OUTPUT_CLOSED = threading.Event()
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_STOPS = [signal.SIGINT, signal.SIGTERM, *([] if _HANGUP is None else [_HANGUP])]


class _Output:
    """A text stream that drops what it is given once its reader has closed it, and requests a stop then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._drop_if_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._drop_if_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _drop_if_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, a closed terminal
                raise
            # The stream writes its buffer again when it is closed, which must not fail.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if not _OUTPUT_CLOSED.is_set():
                _OUTPUT_CLOSED.set()
                LOGGER.warning("the reader of this process's output has closed it: stopping after this step")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def stop_on_closed_output() -> Iterator[None]:
    """Context in which a closed pipe or terminal under stdout or stderr requests a stop, and is no error.

    A killed launcher closes its ranks' output and sends no signal; without this the run would train on unattended.
    """
    _OUTPUT_CLOSED.clear()
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(out), _Output(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


class SignalHandler:
    """Turns SIGINT, SIGTERM and SIGHUP (unless `nohup` ignores it) into a stop after the same step on all ranks.

    `should_stop` starts an all-reduce of one integer over gloo and reads its result at the next step, so that it
    overlaps the step and no rank waits. A second SIGINT raises KeyboardInterrupt at once.

    Args:
        world: the ranks.
        timeout: seconds that the all-reduce may take.

    Attributes:
        signal: the signal that this rank received, or None.
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
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
                if number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # `nohup` ignores it
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._work is not None and kind is None:
            self._work.wait()
        for number, handler in self._previous.items():
            # Ignored after a stop: a launcher repeats its signal, which must not interrupt the shutdown.
            signal.signal(number, signal.SIG_IGN if self._stopping or self.signal is not None else handler)

    def _receive(self, number: int, _: object) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def should_stop(self) -> bool:
        """Whether any rank had a request to stop at the step before; every rank calls it at every step."""
        requested = self.signal is not None or _OUTPUT_CLOSED.is_set()
        if self._group is None:
            self._stopping = requested
            return requested
        stop = False
        if self._work is not None:
            self._work.wait()
            if self._heartbeat is not None:
                self._heartbeat.note_collective()
            stop = self._stopping = bool(self._flag.item())
        self._flag.fill_(int(requested))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop
