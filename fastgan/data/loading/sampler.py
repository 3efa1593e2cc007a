"""Which image is at each position of a run. Positions count the samples of all ranks from the start of the run."""

from __future__ import annotations

import numpy as np

from fastgan.errors import ArgumentError

_WORD = 2**64


class Sampler:
    """Every image once per epoch, in an order that depends on `(seed, epoch)` only.

    Position k is image `order(k // size)[k % size]`. There is no state: a resume needs one number, and the number of
    ranks or workers changes nothing.

    Args:
        size: number of images.
        seed: of the order.

    Raises:
        ArgumentError: `size` is below 1.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ArgumentError("size", size, "must be at least 1")
        self.size = size
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """Return the shuffle of one epoch: int64 [size]. The last two are kept.

        The generator's raw words are sorted, instead of calling `Generator.permutation`: NumPy guarantees the streams
        of its bit generators over versions, but not the methods of `Generator`, and a resume needs the same order.
        """
        if epoch not in self._orders:
            # Two, because a batch, or the prefetch of the next one, may cross the end of an epoch.
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            key = np.array([self.seed % _WORD, epoch], dtype=np.uint64)
            words = np.random.Philox(key=key).random_raw(self.size)
            self._orders[epoch] = np.argsort(words, kind="stable").astype(np.int64, copy=False)
        return self._orders[epoch]

    def indices(self, positions: np.ndarray | range) -> np.ndarray:
        """Return the images at `positions` (int, [n], any order): int64 [n].

        Raises:
            ArgumentError: a position is negative.
        """
        at = np.asarray(positions, dtype=np.int64)
        if at.size and at.min() < 0:
            raise ArgumentError("positions", int(at.min()), "must be at least 0")
        if at.size:
            epoch = int(at.min()) // self.size
            if epoch == int(at.max()) // self.size:
                return self.order(epoch)[at - epoch * self.size]
        epochs, within = np.divmod(at, self.size)
        out = np.empty_like(at)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self.order(int(epoch))[within[here]]
        return out


def rank_positions(start: int, batch: int, rank: int, world: int) -> np.ndarray:
    """Return the positions of one rank's share of a global batch.

    The share is strided: start + rank, start + rank + world, ... Minibatch standard deviation (Karras 2018, sec. 3)
    groups samples i, i + n/g, i + 2n/g, ... of a batch of n into one group of g. With strided shares, each group of a
    rank is exactly one group of the global batch (g dividing n / world), so that training does not depend on the
    number of ranks; contiguous shares would group other images.

    Args:
        start: first position of the global batch.
        batch: its size.
        rank: whose share.
        world: number of ranks.

    Returns:
        int64 [batch / world].

    Raises:
        ArgumentError: `batch` is not a multiple of `world`, or an argument is out of range.
    """
    if world < 1:
        raise ArgumentError("world", world, "must be at least 1")
    if not 0 <= rank < world:
        raise ArgumentError("rank", rank, f"must be 0 to {world - 1}")
    if start < 0:
        raise ArgumentError("start", start, "must be at least 0")
    if batch < 1 or batch % world:
        raise ArgumentError("--batch", batch, f"must be a multiple of {world}, the number of ranks")
    return np.arange(start + rank, start + batch, world, dtype=np.int64)
