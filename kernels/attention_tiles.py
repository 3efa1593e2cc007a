"""What the kernels of attention share: tiles of an array, products of tiles, the place of a program.

An array is a tuple here: where its head begins, its strides, the lines (rows or columns) of a tile, how many lines
there are.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def head_of(base, strides, batch, head):
    """Where one head's array begins; products of 64 bits, for tensors of more than 2^31 elements."""
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def pointers(array, features, WIDE: tl.constexpr):
    base, strides, lines, _ = array
    if WIDE:
        lines = lines.to(tl.int64)
        features = features.to(tl.int64)
    return base + lines[:, None] * strides[2] + features[None, :] * strides[3]


@triton.jit
def load(
    array, first, COUNT: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr
):
    """COUNT features from `first` on, of an array with SIZE features padded to BLOCK; zero outside of the array."""
    features = first + tl.arange(0, COUNT)
    at = pointers(array, features, WIDE)
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
def store(array, tile, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    features = tl.arange(0, BLOCK)
    at = pointers(array, features, WIDE)
    mask = (array[2][:, None] < array[3]) & (features[None, :] < SIZE)
    tl.store(at, tile.to(array[0].dtype.element_ty), mask=mask)


@triton.jit
def product(
    a, a_tile, b, b_tile, total, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + a b^T, a product over the features.

    Exact float32 products do without tensor cores, and then each thread of `tl.dot` holds its lines of both operands
    over the whole inner dimension, which is more than there are registers; of large feature vectors, whole tiles of
    every operand are more than there is shared memory. With CHUNK the operands come in that many features at a time,
    from the cache, and the tiles given are not used.
    """
    if CHUNK == 0:
        total = tl.dot(a_tile, tl.trans(b_tile), total, input_precision=PRECISION)
    else:
        for first in range(0, BLOCK, CHUNK):
            a_chunk = load(a, first, CHUNK, BLOCK, SIZE, EVEN, WIDE)
            b_chunk = load(b, first, CHUNK, BLOCK, SIZE, EVEN, WIDE)
            total = tl.dot(a_chunk, tl.trans(b_chunk), total, input_precision=PRECISION)
    return total


@triton.jit
def place(count, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(batch, head, batch * heads + head, first line of the tile) of this program."""
    per_head = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    which = program // per_head
    tile = program % per_head
    if LAST_FIRST:  # under a causal mask the last rows have the most to do
        tile = per_head - 1 - tile
    return which // heads, which % heads, which.to(tl.int64), tile * BLOCK


@triton.jit
def seen(logits, rows, cols, m, EVEN: tl.constexpr, CAUSAL: tl.constexpr):
    """Logits [rows, columns] with -inf where a row does not see a column."""
    if not EVEN:
        logits = tl.where(cols[None, :] < m, logits, float("-inf"))
    if CAUSAL:
        logits = tl.where(cols[None, :] <= rows[:, None], logits, float("-inf"))
    return logits


@triton.jit
def statistic(base, which, n, rows, OTHER: tl.constexpr):
    """[rows] of a row statistic. Rows past the end have lse = inf, so that P = 0 there."""
    return tl.load(base + which * n + rows, mask=rows < n, other=OTHER)
