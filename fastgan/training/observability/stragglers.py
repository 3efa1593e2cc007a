"""How fast each rank is by itself: who holds the others up."""

from __future__ import annotations

import contextlib
import socket
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastgan.training.observability.rank_log import LOGGER
from fastgan.utils.timers import Stopwatch

if TYPE_CHECKING:
    from fastgan.training.distributed.process_group import ProcessGroup

_SLOW = 2.0


@dataclass(frozen=True)
class Report:
    """Seconds of a step on each rank at work, without waiting for others, over a log interval; `hosts` are theirs."""

    seconds: list[float]
    hosts: list[str]

    @property
    def slowest(self) -> int:
        return max(range(len(self.seconds)), key=self.seconds.__getitem__)

    @property
    def median(self) -> float:
        """The lower one of two: of two ranks, the slower one is measured against the other."""
        return statistics.median_low(self.seconds)

    @property
    def stragglers(self) -> list[int]:
        """Ranks whose step takes more than twice the median."""
        return [rank for rank, own in enumerate(self.seconds) if own > _SLOW * self.median]

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl; stragglers are in it only if there are any."""
        slow = [{"rank": r, "host": self.hosts[r], "step_seconds": self.seconds[r]} for r in self.stragglers]
        return {
            "step_seconds": self.median,
            "slowest_rank": self.slowest,
            "slowest_step_seconds": self.seconds[self.slowest],
            **({"stragglers": slow} if slow else {}),
        }

    def say(self, rank: int) -> str:
        return (
            f"straggler: rank {rank} on {self.hosts[rank]} takes {1000 * self.seconds[rank]:.0f} ms for its own part "
            f"of a step, {self.seconds[rank] / self.median:.1f} times the median"
        )


class StragglerDetector:
    """Times a rank's steps, less what it spends waiting for others. Nothing is read back before `report`.

    What is left is its own: computing, waiting for data, and on a CPU the copying of what is sent.
    """

    def __init__(self, world: ProcessGroup) -> None:
        self._world = world
        self._step = Stopwatch(world.device)
        self.waiting = Stopwatch(world.device)
        self._steps = 0
        self._slow: list[int] = []
        self._hosts = [socket.gethostname()]
        if world.size > 1:
            self._hosts = [""] * world.size
            dist.all_gather_object(self._hosts, socket.gethostname())

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        with self.rest():
            yield
        self._steps += 1

    @contextlib.contextmanager
    def rest(self) -> Iterator[None]:
        """What belongs to the last step and is done after it."""
        if self._world.size == 1:
            yield
            return
        with self._step():
            yield

    def report(self, working: int | None = None) -> Report:
        """Of the steps since the last one, for the first `working` ranks or all; a collective, called when the device
        is read anyway."""
        own = torch.zeros(self._world.size, device=self._world.device)
        own[self._world.rank] = max(self._step.read() - self.waiting.read(), 0.0) / max(self._steps, 1)
        self._steps = 0
        return Report(self._world.sum(own).tolist()[:working], self._hosts)

    def row(self, working: int, say: Callable[[str], None]) -> dict[str, Any]:
        """What metrics.jsonl says of the ranks' speeds, if there are several; a collective. A straggler is named to
        `say` when it turns up, and in its own log each time."""
        if self._world.size == 1:
            return {}
        report = self.report(working)
        for rank in report.stragglers:
            if rank not in self._slow:
                say(report.say(rank))
            if rank not in self._slow or rank == self._world.rank:
                LOGGER.warning(report.say(rank))
        self._slow = report.stragglers
        return report.row()
