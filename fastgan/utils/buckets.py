"""Gradient buckets: how gradients are grouped for all-reduce, in training and in the cost model."""

from __future__ import annotations

from collections.abc import Sequence

# Large enough that bandwidth and not latency dominates an all-reduce, small enough that a backward pass of 20 million
# parameters sends several.
BUCKET_BYTES = 16 * 2**20


def pack(sizes: Sequence[int], limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Group consecutive sizes (bytes) into buckets; a bucket is closed once it holds at least `limit`.

    Returns:
        The buckets, each a list of indices into `sizes`.
    """
    buckets: list[list[int]] = []
    filled = limit
    for index, size in enumerate(sizes):
        if filled >= limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(index)
        filled += size
    return buckets
