"""The seam below a pipeline: what answers "these images, at this resolution", and how that is done ahead of time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch


class Call(NamedTuple):
    """One request: share `rank` of `world` of the global batch of `size` at position `start`."""

    start: int
    size: int
    rank: int
    world: int


class Store(ABC):
    """The images of one source at one resolution, however kept."""

    @abstractmethod
    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        """The images `indices` (int64 [n], on the host and again on the device): uint8 [n, C, r, r] there.

        Dense, contiguous or channels last in memory; the caller does not write to it.
        """

    @abstractmethod
    def describe(self) -> str:
        """How they are kept, to follow "at 64 px by dali: "."""

    def drop(self) -> None:  # noqa: B027, as some have nothing to forget
        """Forget what was begun ahead, if anything is: the order has changed."""

    def close(self) -> None:
        """Drop what is under way, and end what was started. Nothing can be taken any more."""
        self.drop()


class Ahead:
    """Work begun a batch before it is asked for: after a call, the same share of the next global batch.

    A call that was not foreseen is worked on when it comes, so jumping costs time and nothing else.

    begin: starts the work on images (int64 [n]), in one or more futures. indices_of: the images of a call.
    """

    def __init__(
        self, begin: Callable[[np.ndarray], list[Future[Any]]], indices_of: Callable[[Call], np.ndarray]
    ) -> None:
        self._begin, self._indices_of = begin, indices_of
        self.pending: dict[Call, list[Future[Any]]] = {}

    def take(self, call: Call, indices: np.ndarray) -> list[Any]:
        """The results of `begin(indices)`, in its order, once they are there."""
        following = call._replace(start=call.start + call.size)
        # Virtual ranks ask for the shares of one global batch in turn: keep those of this and the next.
        for other in [one for one in self.pending if one.start not in (call.start, following.start)]:
            self._drop(other)
        parts = self.pending.pop(call, None) or self._begin(indices)
        if following not in self.pending:
            self.pending[following] = self._begin(self._indices_of(following))
        return [part.result() for part in parts]

    def drop(self) -> None:
        """Call off what has not begun."""
        for call in list(self.pending):
            self._drop(call)

    def _drop(self, call: Call) -> None:
        for part in self.pending.pop(call):
            part.cancel()


class AheadStore(Store):
    """A store that works on the next batch while one is used."""

    def __init__(self, indices_of: Callable[[Call], np.ndarray]) -> None:
        self._ahead = Ahead(self._begin, indices_of)

    @abstractmethod
    def _begin(self, indices: np.ndarray) -> list[Future[Any]]:
        """See `Ahead`."""

    def drop(self) -> None:
        self._ahead.drop()


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A batch to the device, without waiting for it: from pinned memory where that exists."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def count(number: int, thing: str) -> str:
    """`number` of things, as said: "1 image", "1,797 images"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
