"""Host work per batch: gathering rows of arrays, and bytes to floats. In C++ (csrc/cpu/images.cpp) where it is built.

Both run in one thread. torch's thread pool waits for a time slice (8 ms were seen, for work of 0.1 ms) when a decoding
thread occupies one of its cores.
"""

from __future__ import annotations

import numpy as np
import torch

from fastgan.ops.dispatch import extension


class RowGatherer:
    """Gathers rows of concatenated arrays by index.

    Args:
        arrays: uint8 [n, ...] each, in memory or in memory-mapped files.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        # Plain views: indexing an np.memmap makes a new np.memmap each time, which takes longer than the copy.
        self._arrays = [np.asarray(one) for one in arrays]
        self._shape = arrays[0].shape[1:]
        self._starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        self.bytes_per_row = int(np.prod(self._shape, dtype=np.int64))
        # NumPy copies large rows of one array faster: 1.4 times memcpy's time at 128 px, C++ 1.7 and more.
        large = len(arrays) == 1 and self.bytes_per_row > 2**14
        # An array in Fortran order (`fortran_order` in a .npy) has no contiguous rows.
        if not large and all(one.flags.c_contiguous for one in self._arrays) and extension.cpu() is None:
            addresses = np.array([one.ctypes.data for one in self._arrays], dtype=np.int64)
            self._table = torch.from_numpy(addresses), torch.from_numpy(self._starts)

    @property
    def bytes(self) -> int:
        """Size of all arrays."""
        return sum(one.nbytes for one in self._arrays)

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return uint8 [n, ...] for `indices`, int64 [n], each at least 0 and below the number of rows."""
        if self._table is not None:
            rows = torch.ops.fastgan.gather_rows.default(*self._table, torch.from_numpy(indices), self.bytes_per_row)
            return rows.view(-1, *self._shape)
        if len(self._arrays) == 1:
            return torch.from_numpy(self._arrays[0].take(indices, axis=0))
        out = np.empty((len(indices), *self._shape), dtype=np.uint8)
        # Of arrays that start at the same row, all but the last are empty.
        shards = np.searchsorted(self._starts[:-1], indices, side="right") - 1
        within = indices - self._starts[shards]
        for to, shard, row in zip(out, shards.tolist(), within.tolist(), strict=True):
            to[...] = self._arrays[shard][row]
        return torch.from_numpy(out)


def to_float(images: torch.Tensor, flips: np.ndarray | None) -> torch.Tensor:
    """Convert uint8 [n, C, r, r] to float32 in [-1, 1], and mirror the images with a 1 in `flips` (int64 [n]).

    The values and the memory format are those of torch's operations.
    """
    if extension.cpu() is None:
        return torch.ops.fastgan.finish_images(images, None if flips is None else torch.from_numpy(flips))
    values = np.from_dlpack(images)  # a view
    if flips is not None:
        chosen = flips.astype(bool)
        values = values.copy(order="K")
        values[chosen] = values[chosen][..., ::-1]
    floats = np.divide(values, np.float32(127.5), dtype=np.float32)
    floats -= 1
    return torch.from_numpy(floats)
