"""Work spread over processes, in the order in which it gets done; one worker is this process itself."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self, TypeVar

from fastgan.errors import ArgumentError

Result = TypeVar("Result")


class _Context:
    """What each worker process has: the caller's `shared` object, and how to say that something was done."""

    shared: Any = None
    tick: Callable[[int], object] = staticmethod(lambda count: None)


def shared() -> Any:
    """In a worker: the object that `Workers` was made with."""
    return _Context.shared


def tick(count: int = 1) -> None:
    """In a worker: so much more is done."""
    _Context.tick(count)


class Workers:
    """`count` processes that import only what their work needs, started as every system can ("spawn").

    shared: sent to each once. They end when this process does, however it does.
    """

    def __init__(self, count: int, shared: Any) -> None:
        self._count = count
        self._shared = shared
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self, function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], done: Callable[[int], object]
    ) -> Iterator[Result]:
        """`function(*job)` for each job, results as they come; few jobs are made ahead. `done`: called with ticks.

        Raises: what the function raises; ArgumentError if a process was killed.
        """
        if self._count == 1:
            _Context.shared, _Context.tick = self._shared, done
            for job in jobs:
                yield function(*job)
            return
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._ticks = spawn.Value("q", 0)
            self._pool = ProcessPoolExecutor(self._count, spawn, _begin, (self._shared, self._ticks))
        waiting: set[Future[Result]] = set()
        rest = iter(jobs)
        seen = self._ticks.value
        try:
            while True:
                for job in itertools.islice(rest, 2 * self._count - len(waiting)):
                    waiting.add(self._pool.submit(function, *job))
                if not waiting:
                    return
                ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                now = self._ticks.value
                if now > seen:
                    done(now - seen)
                    seen = now
                for one in ready:
                    yield one.result()
        except BrokenProcessPool as error:
            may_be = (
                "a worker process was killed, perhaps for want of memory, so that fewer may do; or none could start, "
                "as in a script without `if __name__ == '__main__':`; what is finished is kept"
            )
            raise ArgumentError("--workers", self._count, may_be) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _Context.shared = None
        if self._pool is not None:
            # What is under way is left unfinished, also by an interrupt: it is done again by the same command.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)


def _begin(shared: Any, ticks: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the others
    _Context.shared = shared

    def add(count: int) -> None:
        with ticks.get_lock():
            ticks.value += count

    _Context.tick = staticmethod(add)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A pool's worker whose parent was killed would wait for work for ever."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
