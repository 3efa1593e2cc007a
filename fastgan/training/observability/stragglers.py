"""Straggler detection: step times of each rank without its waiting for others."""

from __future__ import annotations

import contextlib
import socket
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastgan.training.observability.rank_log import LOGGER
from fastgan.utils.timers import Stopwatch

if TYPE_CHECKING:
    from fastgan.training.distributed.process_group import ProcessGroup

_STRAGGLER_FACTOR = 2.0


@dataclass(frozen=True)
class RankStepTimes:
    """Mean step times over a log interval.

    Attributes:
        seconds: of a step on each active rank, without waiting for other ranks.
        hosts: of the ranks.
    """

    seconds: list[float]
    hosts: list[str]

    @property
    def slowest(self) -> int:
        return max(range(len(self.seconds)), key=self.seconds.__getitem__)

    @property
    def median(self) -> float:
        """The lower median: of two ranks, the slower one is compared with the faster one."""
        return statistics.median_low(self.seconds)

    @property
    def stragglers(self) -> list[int]:
        """Ranks whose step takes more than twice the median."""
        return [rank for rank, own in enumerate(self.seconds) if own > _STRAGGLER_FACTOR * self.median]

    def row(self) -> dict[str, Any]:
        """Entries of a row in metrics.jsonl; "stragglers" only if there are any."""
        slow = [{"rank": r, "host": self.hosts[r], "step_seconds": self.seconds[r]} for r in self.stragglers]
        return {
            "step_seconds": self.median,
            "slowest_rank": self.slowest,
            "slowest_step_seconds": self.seconds[self.slowest],
            **({"stragglers": slow} if slow else {}),
        }

    def describe(self, rank: int) -> str:
        """A log line about a straggler."""
        return (
            f"straggler: rank {rank} on {self.hosts[rank]} takes {1000 * self.seconds[rank]:.0f} ms for its own part "
            f"of a step, {self.seconds[rank] / self.median:.1f} times the median"
        )


class StragglerDetector:
    """Times a rank's steps, less the time in which it waits for other ranks.

    What remains is computing, waiting for data, and on a CPU copying what is sent. Nothing is read from the device
    between two calls of `report`.

    Attributes:
        waiting: runs while this rank waits for others.
    """

    def __init__(self, world: ProcessGroup) -> None:
        self._world = world
        self._step = Stopwatch(world.device)
        self.waiting = Stopwatch(world.device)
        self._steps = 0
        self._stragglers: list[int] = []
        self._hosts = world.gather(socket.gethostname())

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Context of a step."""
        with self.continue_step():
            yield
        self._steps += 1

    @contextlib.contextmanager
    def continue_step(self) -> Iterator[None]:
        """Context of work that belongs to the last step and is done after it, such as a deferred update."""
        if self._world.size == 1:
            yield
            return
        with self._step():
            yield

    def report(self, active: int | None = None) -> RankStepTimes:
        """Step times since the last call; a collective that reads from the device.

        Args:
            active: report the first so many ranks; None: all.
        """
        own = torch.zeros(self._world.size, device=self._world.device)
        own[self._world.rank] = max(self._step.read() - self.waiting.read(), 0.0) / max(self._steps, 1)
        self._steps = 0
        return RankStepTimes(self._world.sum(own).tolist()[:active], self._hosts)

    def row(self, active: int, log: Callable[[str], None]) -> dict[str, Any]:
        """Entries of the next row in metrics.jsonl; empty for one rank. A collective.

        Args:
            active: see `report`.
            log: called with a line for each rank that has become a straggler since the last call. A straggler also
                warns in its own log, every time.
        """
        if self._world.size == 1:
            return {}
        times = self.report(active)
        for rank in times.stragglers:
            if rank not in self._stragglers:
                log(times.describe(rank))
            if rank not in self._stragglers or rank == self._world.rank:
                LOGGER.warning(times.describe(rank))
        self._stragglers = times.stragglers
        return times.row()
