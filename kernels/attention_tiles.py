"""Shared by the attention kernels: tiles of an array, products of tiles, the tile of a program.

An array is a tuple of: pointer to its head, strides, indices of the lines (rows or columns) of a tile, number of lines.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def head_of(base, strides, batch, head):
    """Pointer to one head, with 64-bit offsets, for tensors of more than 2^31 elements."""
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def pointers(array, features, INT64: tl.constexpr):
    base, strides, lines, _ = array
    if INT64:
        lines = lines.to(tl.int64)
        features = features.to(tl.int64)
    return base + lines[:, None] * strides[2] + features[None, :] * strides[3]


@triton.jit
def load(
    array, first, COUNT: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr
):
    """[lines, COUNT] features from `first` on. The array has SIZE features, padded to BLOCK; 0 outside of it."""
    features = first + tl.arange(0, COUNT)
    at = pointers(array, features, INT64)
    if EVEN and SIZE == BLOCK:
        tile = tl.load(at)
    elif EVEN:
        tile = tl.load(at, mask=features[None, :] < SIZE, other=0.0)
    elif SIZE == BLOCK:
        tile = tl.load(at, mask=array[2][:, None] < array[3], other=0.0)
    else:
        tile = tl.load(at, mask=(array[2][:, None] < array[3]) & (features[None, :] < SIZE), other=0.0)
    return tile


@triton.jit
def store(array, tile, BLOCK: tl.constexpr, SIZE: tl.constexpr, INT64: tl.constexpr):
    features = tl.arange(0, BLOCK)
    at = pointers(array, features, INT64)
    mask = (array[2][:, None] < array[3]) & (features[None, :] < SIZE)
    tl.store(at, tile.to(array[0].dtype.element_ty), mask=mask)


@triton.jit
def product(
    a, a_tile, b, b_tile, total, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + a b^T, a product over the features.

    Exact float32 products do not use tensor cores, and `tl.dot` then keeps the lines of both operands in registers over
    the whole inner dimension, which spills. With large feature vectors, full tiles of all operands exceed shared
    memory. With CHUNK > 0 the operands are therefore loaded that many features at a time, from the cache, and a_tile
    and b_tile are not used.
    """
    if CHUNK == 0:
        total = tl.dot(a_tile, tl.trans(b_tile), total, input_precision=PRECISION)
    else:
        for first in range(0, BLOCK, CHUNK):
            a_chunk = load(a, first, CHUNK, BLOCK, SIZE, EVEN, INT64)
            b_chunk = load(b, first, CHUNK, BLOCK, SIZE, EVEN, INT64)
            total = tl.dot(a_chunk, tl.trans(b_chunk), total, input_precision=PRECISION)
    return total


@triton.jit
def tile_of_program(count, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Batch, head, batch * heads + head, and first line of the tile of this program."""
    per_head = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    which = program // per_head
    tile = program % per_head
    if LAST_FIRST:  # under a causal mask the last rows have the most work
        tile = per_head - 1 - tile
    return which // heads, which % heads, which.to(tl.int64), tile * BLOCK


@triton.jit
def mask_logits(logits, rows, cols, m, EVEN: tl.constexpr, CAUSAL: tl.constexpr):
    """Logits [rows, columns], -inf where a row does not attend to a column."""
    if not EVEN:
        logits = tl.where(cols[None, :] < m, logits, float("-inf"))
    if CAUSAL:
        logits = tl.where(cols[None, :] <= rows[:, None], logits, float("-inf"))
    return logits


@triton.jit
def load_statistic(base, which, n, rows, OTHER: tl.constexpr):
    """A row statistic for `rows`. OTHER is for rows past the end: with lse = inf, P is 0 there."""
    return tl.load(base + which * n + rows, mask=rows < n, other=OTHER)
