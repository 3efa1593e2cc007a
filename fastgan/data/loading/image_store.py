"""The interface between a pipeline and the images: `ImageStore`, and prefetching for those that decode or read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
import torch

from fastgan.data.source_types import Source


class BatchRequest(NamedTuple):
    """One rank's share of a global batch.

    Attributes:
        start: position of the global batch.
        size: images of the global batch.
        rank: whose share.
        world: number of ranks that share the batch.
    """

    start: int
    size: int
    rank: int
    world: int


class ImageStore(ABC):
    """The images of one source at one resolution."""

    @abstractmethod
    def take(self, request: BatchRequest, indices: np.ndarray, device_indices: torch.Tensor) -> torch.Tensor:
        """Return the images of a request on the device.

        Args:
            request: what the indices were computed from.
            indices: int64 [n], on the host.
            device_indices: the same, on the device.

        Returns:
            uint8 [n, C, r, r], contiguous or channels last. The caller must not write to it.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return how the images are stored, as in "decoded by 2 threads"."""

    def drop(self) -> None:  # noqa: B027, not every store prefetches
        """Discard prefetched batches, because the order changed."""

    def close(self) -> None:
        """Discard prefetched batches and stop the threads of the store, which cannot be used afterwards."""
        self.drop()


class Prefetcher:
    """Starts the work on the next global batch when a batch is taken.

    A request that was not expected is started when it comes: jumping costs time and nothing else.

    Args:
        start: starts the work on images `indices` (int64 [n]), in one or more futures.
        indices_of: the images of a request.
    """

    def __init__(
        self, start: Callable[[np.ndarray], list[Future[Any]]], indices_of: Callable[[BatchRequest], np.ndarray]
    ) -> None:
        self._start, self._indices_of = start, indices_of
        self.pending: dict[BatchRequest, list[Future[Any]]] = {}

    def take(self, request: BatchRequest, indices: np.ndarray) -> list[Any]:
        """Wait for the results of `start(indices)` and return them in order."""
        following = request._replace(start=request.start + request.size)
        # Virtual ranks request the shares of one global batch in turn: keep those of this batch and of the next.
        for other in [one for one in self.pending if one.start not in (request.start, following.start)]:
            self._cancel(other)
        parts = self.pending.pop(request, None) or self._start(indices)
        if following not in self.pending:
            self.pending[following] = self._start(self._indices_of(following))
        return [part.result() for part in parts]

    def drop(self) -> None:
        """Cancel all pending work that has not started."""
        for request in list(self.pending):
            self._cancel(request)

    def _cancel(self, request: BatchRequest) -> None:
        for part in self.pending.pop(request):
            part.cancel()


class PrefetchingStore(ImageStore):
    """A store that prepares the next batch while one is used.

    Args:
        indices_of: the images of a request.
        pool: runs the work.
        device: of the batches.
    """

    def __init__(self, indices_of: Callable[[BatchRequest], np.ndarray], pool: Executor, device: torch.device) -> None:
        self._prefetcher = Prefetcher(self._start, indices_of)
        self._pool, self._device = pool, device

    @abstractmethod
    def _start(self, indices: np.ndarray) -> list[Future[Any]]:
        """See `Prefetcher`."""

    def drop(self) -> None:
        self._prefetcher.drop()


class DecodingStore(PrefetchingStore):
    """A store that decodes the images of each batch.

    Args:
        source: the images.
        resolution: px.
        workers: number of decoding threads.
        prefetching: the arguments of `PrefetchingStore`.
    """

    def __init__(self, source: Source, resolution: int, workers: int, *prefetching: Any) -> None:
        super().__init__(*prefetching)
        self._source, self._resolution, self._workers = source, resolution, workers


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a batch to the device without waiting for the copy; through pinned memory on CUDA."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def counted(number: int, noun: str) -> str:
    """Return "1 image", "1,797 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
