"""A pool of worker processes. A pool of one runs everything in this process."""

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
    """What each worker process has: the shared object, and the function that reports progress."""

    shared: Any = None
    tick: Callable[[int], object] = staticmethod(lambda count: None)


def shared() -> Any:
    """In a worker: return the object that `WorkerPool` was created with."""
    return _Context.shared


def tick(count: int = 1) -> None:
    """In a worker: report that `count` more images are done."""
    _Context.tick(count)


class WorkerPool:
    """Worker processes, started with "spawn": they import only what their work needs. They end with this process.

    Args:
        count: number of processes.
        shared: sent to each process once.
    """

    def __init__(self, count: int, shared: Any) -> None:
        self._count = count
        self._shared = shared
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self, function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], on_progress: Callable[[int], object]
    ) -> Iterator[Result]:
        """Yield `function(*job)` for each job, in the order of completion.

        Args:
            function: runs in a worker.
            jobs: taken lazily.
            on_progress: called with the number of images done since the last call.

        Raises:
            ArgumentError: a process was killed. What `function` raises is raised, too.
        """
        if self._count == 1:
            _Context.shared, _Context.tick = self._shared, on_progress
            for job in jobs:
                yield function(*job)
            return
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._ticks = spawn.Value("q", 0)
            self._pool = ProcessPoolExecutor(self._count, spawn, _initialize, (self._shared, self._ticks))
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
                    on_progress(now - seen)
                    seen = now
                for one in ready:
                    yield one.result()
        except BrokenProcessPool as error:
            problem = (
                "a worker process was killed, perhaps because memory ran out (use fewer); or none could start, as in "
                "a script without `if __name__ == '__main__':`; finished shards are kept"
            )
            raise ArgumentError("--workers", self._count, problem) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _Context.shared = None
        if self._pool is not None:
            # Unfinished jobs are lost, as after an interrupt: the same command does them again.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)


def _initialize(shared: Any, ticks: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    _Context.shared = shared

    def add(count: int) -> None:
        with ticks.get_lock():
            ticks.value += count

    _Context.tick = staticmethod(add)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    """Exit when the parent does; a worker whose parent was killed would wait for jobs forever."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
