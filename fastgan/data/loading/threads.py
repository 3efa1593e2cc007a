"""A store that decodes images with Pillow in threads, one batch ahead. Works on every system."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from fastgan.data.loading.image_store import BatchRequest, DecodingStore, counted, upload


class ThreadedStore(DecodingStore):
    """Reads every image from the source when its batch is next.

    Threads instead of a DataLoader's processes: Pillow releases the GIL while it decodes and resizes, so threads are
    as fast (docs/data.md has the numbers), start at once, and copy nothing between processes.
    """

    def take(self, request: BatchRequest, indices: np.ndarray, device_indices: torch.Tensor) -> torch.Tensor:
        return upload(torch.from_numpy(np.concatenate(self._prefetcher.take(request, indices))), self._device)

    def describe(self) -> str:
        return f"decoded by {counted(self._workers, 'thread')}"

    def _start(self, indices: np.ndarray) -> list[Future[Any]]:
        # A few images per task: for small images, handing over a task takes as long as decoding one.
        pieces = min(len(indices), 4 * self._workers)
        return [self._pool.submit(self._read, piece) for piece in np.array_split(indices, pieces)]

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self._source.read(index, self._resolution) for index in indices.tolist()])
