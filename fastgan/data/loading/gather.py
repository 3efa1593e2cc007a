"""On the host: rows of arrays by index, and bytes made floats. In C++ (csrc/cpu/images.cpp) where that is built.

One thread each: torch's are shared among all cores, and wait for a time slice (8 ms were seen, for work of 0.1 ms)
where a decoding thread has one of them.
"""

from __future__ import annotations

import numpy as np
import torch

from fastgan.ops import extension


class Rows:
    """arrays: uint8 [n, ...], one below the other, each of which lies in one piece of memory or a mapped file."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        # A plain view: indexing an np.memmap makes another np.memmap each time, which takes longer than the copy.
        self._arrays = [np.asarray(one) for one in arrays]
        self._shape = arrays[0].shape[1:]
        self._starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        self.bytes_of_row = int(np.prod(self._shape, dtype=np.int64))
        # Large rows of one array are copied faster by NumPy: 1.4 times memcpy's time at 128 px, where C++ was seen to
        # take 1.7 and more.
        large = len(arrays) == 1 and self.bytes_of_row > 2**14
        # What is laid out otherwise (`fortran_order` in a .npy) has no rows to copy.
        if not large and all(one.flags.c_contiguous for one in self._arrays) and extension.cpu() is None:
            addresses = np.array([one.ctypes.data for one in self._arrays], dtype=np.int64)
            self._table = torch.from_numpy(addresses), torch.from_numpy(self._starts)

    @property
    def bytes(self) -> int:
        return sum(one.nbytes for one in self._arrays)

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """uint8 [n, ...] of `indices` (int64 [n], each from 0 to below the number of rows)."""
        if self._table is not None:
            which = torch.from_numpy(indices)
            rows = torch.ops.fastgan.gather_rows.default(*self._table, which, self.bytes_of_row)
            return rows.view(-1, *self._shape)
        if len(self._arrays) == 1:
            return torch.from_numpy(self._arrays[0].take(indices, axis=0))
        out = np.empty((len(indices), *self._shape), dtype=np.uint8)
        # Of arrays that start at the same row only the last has any.
        shards = np.searchsorted(self._starts[:-1], indices, side="right") - 1
        within = indices - self._starts[shards]
        for to, shard, row in zip(out, shards.tolist(), within.tolist(), strict=True):
            to[...] = self._arrays[shard][row]
        return torch.from_numpy(out)


def finish(images: torch.Tensor, flips: np.ndarray | None) -> torch.Tensor:
    """uint8 [n, C, r, r] to float32 in [-1, 1], those with a 1 in `flips` (int64 [n]) turned round.

    The values of torch's operations, in the images' order of dimensions in memory.
    """
    if extension.cpu() is None:
        return torch.ops.fastgan.finish_images(images, None if flips is None else torch.from_numpy(flips))
    values = np.from_dlpack(images)  # a view, which NumPy refuses of a tensor that a device would have to send
    if flips is not None:
        chosen = flips.astype(bool)
        values = values.copy(order="K")
        values[chosen] = values[chosen][..., ::-1]
    floats = np.divide(values, np.float32(127.5), dtype=np.float32)
    floats -= 1
    return torch.from_numpy(floats)
