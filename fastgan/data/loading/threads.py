"""Images decoded by Pillow in threads, a batch ahead: works wherever Python does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch

from fastgan.data.loading.image_store import AheadStore, Call, count, upload
from fastgan.data.source import Source


class Threads(AheadStore):
    """Every image is read from its source when its batch is near.

    Threads, not the processes of a DataLoader: Pillow lets go of Python's lock while it decodes and resizes, so they
    are as fast (docs/data.md has the numbers), start at once, and nothing is copied between processes.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        device: torch.device,
        pool: Executor,
        workers: int,
        indices_of: Callable[[Call], np.ndarray],
    ) -> None:
        super().__init__(indices_of)
        self._source, self._resolution, self._device = source, resolution, device
        self._pool, self._workers = pool, workers

    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        return upload(torch.from_numpy(np.concatenate(self._ahead.take(call, indices))), self._device)

    def describe(self) -> str:
        return f"decoded by {count(self._workers, 'thread')}"

    def _begin(self, indices: np.ndarray) -> list[Future[Any]]:
        # A few images each: handing one over takes as long as decoding it, where it is small.
        pieces = min(len(indices), 4 * self._workers)
        return [self._pool.submit(self._read, piece) for piece in np.array_split(indices, pieces)]

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self._source.read(index, self._resolution) for index in indices.tolist()])
