"""Images that are decoded already: in one tensor on the device, or memory-mapped files. No workers, no decoding."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch

from fastgan.data.loading.gather import Rows
from fastgan.data.loading.image_store import AheadStore, Call, Store, upload
from fastgan.utils.text import readable_size

if sys.platform == "linux":
    import resource

_IN_A_ROW = 8  # batches
_SMALL = 2**22  # bytes of a batch that is not worth handing over


class Resident(Store):
    """All images in one tensor on the device. images: uint8 [N, C, r, r]."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = images
        self._host = Rows([images.numpy()]) if images.device.type == "cpu" else None

    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        if self._host is None:
            return self._images.index_select(0, on_device)
        return self._host.take(indices)

    def describe(self) -> str:
        place = "memory" if self._host is not None else f"memory of {self._images.device}"
        return f"in {place} ({readable_size(self._images.numel())})"


class Mapped(AheadStore):
    """Images in memory-mapped arrays: the system's page cache holds what was read, once for all ranks of a machine.

    arrays: uint8 [n, C, r, r] each, in order. Rows are gathered in a thread, a batch ahead: that hides the disk
    where pages are read for the first time. Once many batches in a row had no need of the disk, they are gathered where
    they are asked for: to hand a batch over takes longer than to gather it (50 us and 20, 32 images of 64 px).
    """

    def __init__(
        self,
        arrays: list[np.ndarray],
        device: torch.device,
        pool: Executor,
        indices_of: Callable[[Call], np.ndarray],
    ) -> None:
        super().__init__(indices_of)
        self._rows = Rows(arrays)
        self._device, self._pool = device, pool
        self._without_disk = 0  # batches since one waited for it

    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        if self._without_disk >= _IN_A_ROW and len(indices) * self._rows.bytes_of_row <= _SMALL:
            self._ahead.drop()
            images, waits = self._gather(indices)
        else:
            images, waits = self._ahead.take(call, indices)[0]
        self._without_disk = 0 if waits else self._without_disk + 1
        return upload(images, self._device)

    def describe(self) -> str:
        return f"memory-mapped ({readable_size(self._rows.bytes)})"

    def _begin(self, indices: np.ndarray) -> list[Future[Any]]:
        return [self._pool.submit(self._gather, indices)]

    def _gather(self, indices: np.ndarray) -> tuple[torch.Tensor, bool]:
        """The rows, and whether the disk was waited for."""
        before = _waits_for_disk()
        images = self._rows.take(indices)
        return images, before is None or _waits_for_disk() != before


def _waits_for_disk() -> int | None:
    """How often this thread touched a page that was not in memory, so far; None where the system does not say."""
    if sys.platform != "linux":
        return None
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def upload_all(arrays: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """All of `arrays`, one below the other, in one tensor on the device: uint8 [N, C, r, r]."""
    images = torch.empty((sum(map(len, arrays)), *arrays[0].shape[1:]), dtype=torch.uint8, device=device)
    for part, array in zip(images.split([len(array) for array in arrays]), arrays, strict=True):
        part.copy_(torch.from_numpy(np.array(array)))
    return images
