"""Gradients averaged over ranks in buckets, which are sent while the backward still runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastgan.utils.buckets import pack
from fastgan.utils.timers import Stopwatch


class _Bucket:
    """Gradients in one flat buffer, which is sent as one message."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        pieces = self.buffer.split([p.numel() for p in parameters])
        # Fused optimizers assume that a gradient has its parameter's strides.
        self.views = [
            piece.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), piece.storage_offset())
            for piece, p in zip(pieces, parameters, strict=True)
        ]
        self.missing = len(parameters)
        self.work: dist.Work | None = None

    def send(self, ranks: int, group: Any) -> None:
        """Start the all-reduce; a parameter without a gradient in this step counts as zero."""
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
        self.buffer.mul_(1 / ranks)
        self.work = dist.all_reduce(self.buffer, group=group, async_op=True)


class GradientReducer:
    """Averages the gradients of a module over ranks, once for each optimizer step.

    A bucket is sent once its last gradient exists, in the same order on all ranks, and NCCL or gloo reduces it during
    the rest of the backward. The first step shows in which order gradients appear, and sends all of them at its end;
    then every rank adopts rank 0's order. The average is left in `.grad`, as a view of the bucket.

    Call `expect` before the backward of an optimizer step's last micro-batch, `flush` after it, and `finish` before the
    gradients are used. Work between `flush` and `finish` does not wait for other ranks.

    Args:
        module: its trainable parameters are reduced.
        waiting: runs while this rank waits for others.
        group: the ranks, which include this one and rank 0; None: all.
    """

    def __init__(self, module: nn.Module, waiting: Stopwatch, group: Any = None) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad and p.numel()]
        self._group, self._ranks = group, dist.get_world_size(group)
        self._waiting = waiting
        self._expecting = False
        self._seen: list[int] | None = []
        self._set_order(range(len(self._parameters)))
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda _, index=i: self._arrived(index))
            for i, p in enumerate(self._parameters)
        ]

    def _set_order(self, order: Sequence[int]) -> None:
        parameters = [self._parameters[i] for i in order]
        cut = pack([p.numel() * p.element_size() for p in parameters])
        self._buckets = [_Bucket([parameters[i] for i in indices]) for indices in cut]
        places = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket.parameters}
        self._bucket_of = [places[id(p)] for p in self._parameters]

    def expect(self) -> None:
        """Announce that the next backward completes the gradients."""
        self._expecting = True
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _arrived(self, index: int) -> None:
        if not self._expecting:
            return
        if self._seen is not None:
            self._seen.append(index)
            return
        self._buckets[self._bucket_of[index]].missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            self._send()

    def _send(self) -> None:
        self._buckets[self._next].send(self._ranks, self._group)
        self._next += 1

    def flush(self) -> None:
        """Send the remaining buckets."""
        self._expecting = False
        while self._next < len(self._buckets):
            self._send()

    def finish(self) -> None:
        """Wait for all buckets, on a GPU without blocking the host; then every `.grad` is the average."""
        with self._waiting():
            for bucket in self._buckets:
                assert bucket.work is not None
                bucket.work.wait()
                bucket.work = None
        for bucket in self._buckets:
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                p.grad = view
        if self._seen is not None:
            self._adopt_order(self._seen)

    def _adopt_order(self, seen: list[int]) -> None:
        """Pack the buckets in the order of rank 0's gradients; parameters without a gradient come last."""
        self._seen = None
        order = [*dict.fromkeys(seen), *(i for i in range(len(self._parameters)) if i not in set(seen))]
        shared = torch.tensor(order, dtype=torch.int64, device=self._parameters[0].device)
        dist.broadcast(shared, src=0, group=self._group)
        self._set_order(shared.tolist())

    def close(self) -> None:
        """Remove the hooks and free the buckets."""
        for handle in self._handles:
            handle.remove()
        self._buckets = []
