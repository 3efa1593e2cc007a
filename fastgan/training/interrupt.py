"""SIGINT and SIGTERM: a request to stop after the step."""

from __future__ import annotations

import datetime
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

from fastgan.training.world import World


class Interrupt:
    """SIGINT and SIGTERM as a request to stop after the step, agreed on by all ranks without stalling any.

    Each step's agreement is collected at the next one, so that its all-reduce (over gloo, of one host integer)
    overlaps the step. A second SIGINT interrupts at once.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.signal: int | None = None
        self._group: Any = None
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: Any = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._work is not None and kind is None:
            self._work.wait()
        for number, handler in self._before.items():
            # A launcher repeats its signal; what follows one that was obeyed must not cut the way out short.
            signal.signal(number, handler if self.signal is None else signal.SIG_IGN)

    def _receive(self, number: int, _: object) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self) -> bool:
        """Whether the ranks agreed at the step before to stop now; called by all at every step."""
        if self._group is None:
            return self.signal is not None
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._flag.item())
        self._flag.fill_(int(self.signal is not None))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop
