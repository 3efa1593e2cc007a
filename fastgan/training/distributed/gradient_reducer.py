"""Gradients averaged over ranks in buckets that are sent while the backward goes on; weights to ranks that had none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan.utils.buckets import pack
from fastgan.utils.timers import Stopwatch


class _Bucket:
    """Some gradients one after the other in a buffer: what is sent in one piece."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        pieces = self.buffer.split([p.numel() for p in parameters])
        # With the parameter's own strides, which fused optimizers take for granted.
        self.views = [
            piece.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), piece.storage_offset())
            for piece, p in zip(pieces, parameters, strict=True)
        ]
        self.missing = len(parameters)
        self.work: dist.Work | None = None

    def send(self, ranks: int, group: Any) -> None:
        """Average over ranks; a gradient that this step has none of counts as zero."""
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
        self.buffer.mul_(1 / ranks)
        self.work = dist.all_reduce(self.buffer, group=group, async_op=True)


class GradientReducer:
    """Averages the gradients of a module over ranks, once for each optimizer step.

    A bucket is sent once its last gradient is there, in one order on all ranks; NCCL and gloo both work on it while
    the backward goes on. In which order gradients appear is seen in the first step, which sends all of them at its
    end; the first rank's order is everybody's. The average is left in `.grad`, as a view of the bucket.

    Usage: `expect` before the backward of an optimizer step's last micro-batch, `flush` after it, and `finish` before
    the gradients are used: what a rank computes in between does not wait for the others.

    Args:
        waiting: runs while this rank waits for others.
        group: the ranks, among them this one and the first of all; None: all.
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
        """The next backward completes the gradients."""
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
        """Send what is left."""
        self._expecting = False
        while self._next < len(self._buckets):
            self._send()

    def finish(self) -> None:
        """Wait for what was sent, without the host waiting for a GPU; then every `.grad` is the average."""
        with self._waiting():
            for bucket in self._buckets:
                assert bucket.work is not None
                bucket.work.wait()
                bucket.work = None
        for bucket in self._buckets:
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                p.grad = view
        if self._seen is not None:
            self._agree(self._seen)

    def _agree(self, seen: list[int]) -> None:
        """Pack anew in the order in which the first rank's gradients appeared, those that did not at the end."""
        self._seen = None
        order = [*dict.fromkeys(seen), *(i for i in range(len(self._parameters)) if i not in set(seen))]
        agreed = torch.tensor(order, dtype=torch.int64, device=self._parameters[0].device)
        dist.broadcast(agreed, src=0, group=self._group)
        self._set_order(agreed.tolist())

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._buckets = []


# Elements that a rank adds and passes on in one piece.
_PIECE = 1 << 18


def reduce_to(tensor: Tensor, dst: int, group: Any = None) -> None:
    """Sum over ranks into rank `dst`'s `tensor`; a collective of the group, on host memory.

    The ranks pass their sums on, piece by piece, to the next one and last to `dst`: all bytes leave each of the others
    once. gloo's own is a reduce-scatter over all ranks whose parts then go to `dst`, (n-1)/n^2 more in a ZeRO step. The
    order of the sum depends on `dst` and the group alone.

    Args:
        tensor: contiguous, of one shape and dtype on all ranks; on others than `dst` it holds part of the sum then.
        dst: rank in the whole world, as `torch.distributed.reduce` has it.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    own = ranks.index(dist.get_rank())
    place = (own - ranks.index(dst) - 1) % len(ranks)
    before, after = ranks[own - 1], ranks[(own + 1) % len(ranks)]
    pieces = tensor.view(-1).split(_PIECE)
    arriving: list[tuple[Tensor, Any]] = []
    leaving: list[Any] = []

    def expect(piece: Tensor) -> None:
        received = torch.empty_like(piece)
        arriving.append((received, dist.irecv(received, src=before, group=group)))

    if place:
        expect(pieces[0])
    for piece, following in zip_longest(pieces, pieces[1:]):
        if place:
            received, work = arriving.pop()
            if following is not None:
                expect(following)
            work.wait()
            piece += received
        if place < len(ranks) - 1:
            leaving.append(dist.isend(piece, dst=after, group=group))
    for work in leaving:
        work.wait()


def spread(tensors: Iterable[Tensor]) -> None:
    """The first rank's values into every rank's `tensors`, in place; a collective of all ranks."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
