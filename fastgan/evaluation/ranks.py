"""Communication of an evaluation on several ranks. Without a process group there is one rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: Any) -> list[Any] | None:
    """The values of all ranks, by rank, on the first; None on the others. A collective."""
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    if dist.get_backend() == "gloo":
        dist.gather_object(value, values if rank == 0 else None)
    else:
        dist.all_gather_object(values, value)  # NCCL cannot gather to one rank
    return values if rank == 0 else None


def broadcast(value: Any) -> Any:
    """The first rank's `value` on every rank. A collective."""
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
