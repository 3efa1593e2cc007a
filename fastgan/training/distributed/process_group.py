"""The ranks of a run: which one this process is, and the collectives of small values between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.training.resilience.heartbeat import Heartbeat


@dataclass(frozen=True)
class ProcessGroup:
    """This process among the `size` ranks of a run.

    Attributes:
        rank: number of this process, from 0.
        size: number of ranks.
        device: device of this process.
        engine: "deepspeed" or "torch".
        reason: why this engine.
        heartbeat: watches the other ranks, if there are any.
    """

    rank: int
    size: int
    device: torch.device
    engine: str
    reason: str
    heartbeat: Heartbeat | None = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """Elementwise minimum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def agree(self, *facts: bool) -> list[bool]:
        """For each fact, whether it holds on every rank; a collective."""
        if self.size == 1:
            return list(facts)
        return [value > 0 for value in self.minimum(torch.tensor(facts, dtype=torch.float32).to(self.device)).tolist()]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, a small picklable object, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, a small picklable object, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Context of a rank's work; see `Heartbeat.guard`."""
        return self.heartbeat.guard() if self.heartbeat is not None else contextlib.nullcontext()

    def done(self) -> None:
        """Report that this rank has finished; without it, ranks that still work take its exit for a failure."""
        if self.heartbeat is not None:
            self.heartbeat.close()


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values into every rank's `tensors`, in place; a collective of all ranks."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
