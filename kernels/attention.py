"""Attention and its first and second derivative, tile by tile: only row statistics reach memory.

    S = scale Q K^T      P = softmax(S)      O = P V
    first backward, given dO:
      dP = dO V^T      D = rowsum(dO * O)      dS = P * (dP - D)
      dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO
    second backward, given the cotangents uQ, uK, uV of dQ, dK, dV:
      E = scale (uQ K^T + Q uK^T)      F = dO uV^T      e = rowsum(P * E)      r = rowsum(P * (F + E * (dP - D)))
      gdO = [P * (E - e)] V + P uV
      gS = P * (F + (E - e) * (dP - D) - r)
      gQ = scale (gS K + dS uK)      gK = scale (gS^T Q + dS^T uQ)      gV = [P * (E - e)]^T dO

(r of this form is the r of the usual one plus e D, which cancels against e dP - e D in gS.) P is computed anew from the
log-sum-exp of its row wherever it is needed. Rows (queries) and columns (keys) are swept by different programs, each of
which owns what it writes: there are no atomics, and two runs agree bit for bit.

Shapes: q, uq [B, H, N, d]; k, uk [B, H, M, d]; v, uv [B, H, M, dv]; o, do [B, H, N, dv]; any strides; float32, float16
or bfloat16, one dtype in a call; row statistics float32 [B, H, N]. d and dv from 1 to 256. `causal`: row i sees the
columns up to i (aligned at the top left).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastgan.kernels import tiles
from fastgan.kernels.launch import float32_precision, on, wide
from torch import Tensor

_LOG2_E = tl.constexpr(math.log2(math.e))


# An array of the helpers below is a tuple: where its head begins, its strides, the lines (rows or columns) of a tile,
# how many lines there are.


@triton.jit
def _head(base, strides, batch, head):
    """Where one head's array begins; products of 64 bits, for tensors of more than 2^31 elements."""
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _pointers(array, features, WIDE: tl.constexpr):
    base, strides, lines, _ = array
    if WIDE:
        lines = lines.to(tl.int64)
        features = features.to(tl.int64)
    return base + lines[:, None] * strides[2] + features[None, :] * strides[3]


@triton.jit
def _load(
    array, first, COUNT: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr
):
    """COUNT features from `first` on, of an array with SIZE features padded to BLOCK; zero outside of the array."""
    features = first + tl.arange(0, COUNT)
    pointers = _pointers(array, features, WIDE)
    if EVEN and SIZE == BLOCK:
        tile = tl.load(pointers)
    elif EVEN:
        tile = tl.load(pointers, mask=features[None, :] < SIZE, other=0.0)
    elif SIZE == BLOCK:
        tile = tl.load(pointers, mask=array[2][:, None] < array[3], other=0.0)
    else:
        tile = tl.load(pointers, mask=(array[2][:, None] < array[3]) & (features[None, :] < SIZE), other=0.0)
    return tile


@triton.jit
def _store(array, tile, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    features = tl.arange(0, BLOCK)
    pointers = _pointers(array, features, WIDE)
    mask = (array[2][:, None] < array[3]) & (features[None, :] < SIZE)
    tl.store(pointers, tile.to(array[0].dtype.element_ty), mask=mask)


@triton.jit
def _product(
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
            a_chunk = _load(a, first, CHUNK, BLOCK, SIZE, EVEN, WIDE)
            b_chunk = _load(b, first, CHUNK, BLOCK, SIZE, EVEN, WIDE)
            total = tl.dot(a_chunk, tl.trans(b_chunk), total, input_precision=PRECISION)
    return total


@triton.jit
def _place(count, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(batch, head, batch * heads + head, first line of the tile) of this program."""
    per_head = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    which = program // per_head
    tile = program % per_head
    if LAST_FIRST:  # under a causal mask the last rows have the most to do
        tile = per_head - 1 - tile
    return which // heads, which % heads, which.to(tl.int64), tile * BLOCK


@triton.jit
def _seen(logits, rows, cols, m, EVEN: tl.constexpr, CAUSAL: tl.constexpr):
    """Logits [rows, columns] with -inf where a row does not see a column."""
    if not EVEN:
        logits = tl.where(cols[None, :] < m, logits, float("-inf"))
    if CAUSAL:
        logits = tl.where(cols[None, :] <= rows[:, None], logits, float("-inf"))
    return logits


@triton.jit
def _statistic(base, which, n, rows, OTHER: tl.constexpr):
    """[rows] of a row statistic. Rows past the end have lse = inf, so that P = 0 there."""
    return tl.load(base + which * n + rows, mask=rows < n, other=OTHER)


@triton.jit
def _forward_kernel(
    q, k, v, o, lse,
    q_strides, k_strides, v_strides, o_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, which, first = _place(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = _head(k, k_strides, batch, head)
    v = _head(v, v_strides, batch, head)
    Q = (_head(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = _load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = _load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
        logits = _product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION) * (scale * _LOG2_E)
        logits = _seen(logits, rows, cols, m, EVEN, CAUSAL)
        # Column 0 is in the first tile and every row sees it, so this is finite from the first tile on.
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        V = (v, v_strides, cols, m)
        v_tile = _load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
        out = tl.dot(p.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision=PRECISION)
        highest = higher
    _store((_head(o, o_strides, batch, head), o_strides, rows, n), out / total[:, None], BLOCK_DV, DV, WIDE)
    tl.store(lse + which * n + rows, (highest + tl.log2(total)) / _LOG2_E, mask=rows < n)


@triton.jit
def _backward_rows_kernel(
    do, q, k, v, o, lse, delta, dq,
    do_strides, q_strides, k_strides, v_strides, o_strides, dq_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and D for the column sweep."""
    batch, head, which, first = _place(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = _head(k, k_strides, batch, head)
    v = _head(v, v_strides, batch, head)
    Q = (_head(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = _load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    DO = (_head(do, do_strides, batch, head), do_strides, rows, n)
    do_tile = _load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    OUT = (_head(o, o_strides, batch, head), o_strides, rows, n)
    o_tile = _load(OUT, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    d_rows = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + which * n + rows, d_rows, mask=rows < n)
    lse_rows = _statistic(lse, which, n, rows, float("inf")) * _LOG2_E
    sum_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = _load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
        V = (v, v_strides, cols, m)
        v_tile = _load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
        logits = _product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION) * (scale * _LOG2_E)
        logits = _seen(logits, rows, cols, m, EVEN, CAUSAL)
        p = tl.exp2(logits - lse_rows[:, None])
        slope = _product(DO, do_tile, V, v_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION) - d_rows[:, None]
        sum_q = tl.dot((p * slope).to(k_tile.dtype), k_tile, sum_q, input_precision=PRECISION)
    _store((_head(dq, dq_strides, batch, head), dq_strides, rows, n), sum_q * scale, BLOCK_D, D, WIDE)


@triton.jit
def _backward_columns_kernel(
    do, q, k, v, lse, delta, dk, dv,
    do_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV. Tiles are [columns, rows]: the products over rows then need no transposed P."""
    batch, head, which, first = _place(m, heads, COLS, False)
    cols = first + tl.arange(0, COLS)
    zeros = tl.zeros([COLS, ROWS], tl.float32)
    q = _head(q, q_strides, batch, head)
    do = _head(do, do_strides, batch, head)
    K = (_head(k, k_strides, batch, head), k_strides, cols, m)
    k_tile = _load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    V = (_head(v, v_strides, batch, head), v_strides, cols, m)
    v_tile = _load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    sum_k = tl.zeros([COLS, BLOCK_D], tl.float32)
    sum_v = tl.zeros([COLS, BLOCK_DV], tl.float32)
    begin = 0
    if CAUSAL:
        begin = first // ROWS * ROWS
    for start in range(begin, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        Q = (q, q_strides, rows, n)
        q_tile = _load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
        DO = (do, do_strides, rows, n)
        do_tile = _load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
        lse_rows = _statistic(lse, which, n, rows, float("inf")) * _LOG2_E
        d_rows = _statistic(delta, which, n, rows, 0.0)
        logits = _product(K, k_tile, Q, q_tile, zeros, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION) * (scale * _LOG2_E)
        if CAUSAL:
            logits = tl.where(cols[:, None] <= rows[None, :], logits, float("-inf"))
        p = tl.exp2(logits - lse_rows[None, :])
        sum_v = tl.dot(p.to(do_tile.dtype), do_tile, sum_v, input_precision=PRECISION)
        slope = _product(V, v_tile, DO, do_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION) - d_rows[None, :]
        sum_k = tl.dot((p * slope).to(q_tile.dtype), q_tile, sum_k, input_precision=PRECISION)
    _store((_head(dk, dk_strides, batch, head), dk_strides, cols, m), sum_k * scale, BLOCK_D, D, WIDE)
    _store((_head(dv, dv_strides, batch, head), dv_strides, cols, m), sum_v, BLOCK_DV, DV, WIDE)


@triton.jit
def _second_statistics_kernel(
    uq, uk, uv, do, q, k, v, o, lse, delta, e, r,
    uq_strides, uk_strides, uv_strides, do_strides, q_strides, k_strides, v_strides, o_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D, e and r. A cotangent that is None takes its products with it, here and in the two kernels below."""
    batch, head, which, first = _place(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = _head(k, k_strides, batch, head)
    v = _head(v, v_strides, batch, head)
    if uk is not None:
        uk = _head(uk, uk_strides, batch, head)
    if uv is not None:
        uv = _head(uv, uv_strides, batch, head)
    Q = (_head(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = _load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    DO = (_head(do, do_strides, batch, head), do_strides, rows, n)
    do_tile = _load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    if uq is not None:
        UQ = (_head(uq, uq_strides, batch, head), uq_strides, rows, n)
        uq_tile = _load(UQ, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    OUT = (_head(o, o_strides, batch, head), o_strides, rows, n)
    o_tile = _load(OUT, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    d_rows = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + which * n + rows, d_rows, mask=rows < n)
    lse_rows = _statistic(lse, which, n, rows, float("inf")) * _LOG2_E
    e_rows = tl.zeros([ROWS], tl.float32)
    r_rows = tl.zeros([ROWS], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = _load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
        logits = _product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION) * (scale * _LOG2_E)
        logits = _seen(logits, rows, cols, m, EVEN, CAUSAL)
        p = tl.exp2(logits - lse_rows[:, None])
        if uv is not None:
            UV = (uv, uv_strides, cols, m)
            uv_tile = _load(UV, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
            f_tile = _product(DO, do_tile, UV, uv_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION)
            r_rows += tl.sum(p * f_tile, 1)
        if uq is not None or uk is not None:
            e_tile = zeros
            if uq is not None:
                e_tile = _product(UQ, uq_tile, K, k_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION)
            if uk is not None:
                UK = (uk, uk_strides, cols, m)
                uk_tile = _load(UK, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
                e_tile = _product(Q, q_tile, UK, uk_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION)
            pe = p * e_tile * scale
            e_rows += tl.sum(pe, 1)
            V = (v, v_strides, cols, m)
            v_tile = _load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
            dp = _product(DO, do_tile, V, v_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION)
            r_rows += tl.sum(pe * (dp - d_rows[:, None]), 1)
    tl.store(e + which * n + rows, e_rows, mask=rows < n)
    tl.store(r + which * n + rows, r_rows, mask=rows < n)


@triton.jit
def _second_rows_kernel(
    uq, uk, uv, do, q, k, v, lse, delta, e, r, gq, gdo,
    uq_strides, uk_strides, uv_strides, do_strides, q_strides, k_strides, v_strides, gq_strides, gdo_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gQ and gdO."""
    batch, head, which, first = _place(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = _head(k, k_strides, batch, head)
    v = _head(v, v_strides, batch, head)
    if uk is not None:
        uk = _head(uk, uk_strides, batch, head)
    if uv is not None:
        uv = _head(uv, uv_strides, batch, head)
    Q = (_head(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = _load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    DO = (_head(do, do_strides, batch, head), do_strides, rows, n)
    do_tile = _load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    if uq is not None:
        UQ = (_head(uq, uq_strides, batch, head), uq_strides, rows, n)
        uq_tile = _load(UQ, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    lse_rows = _statistic(lse, which, n, rows, float("inf")) * _LOG2_E
    d_rows = _statistic(delta, which, n, rows, 0.0)
    e_rows = _statistic(e, which, n, rows, 0.0)
    r_rows = _statistic(r, which, n, rows, 0.0)
    sum_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_do = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = _load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
        logits = _product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION) * (scale * _LOG2_E)
        logits = _seen(logits, rows, cols, m, EVEN, CAUSAL)
        p = tl.exp2(logits - lse_rows[:, None])
        gs = zeros - r_rows[:, None]  # gS / P, of its terms as many as there are
        if uv is not None:
            UV = (uv, uv_strides, cols, m)
            uv_tile = _load(UV, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
            gs = _product(DO, do_tile, UV, uv_tile, gs, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION)
            sum_do = tl.dot(p.to(uv_tile.dtype), uv_tile, sum_do, input_precision=PRECISION)
        if uq is not None or uk is not None:
            V = (v, v_strides, cols, m)
            v_tile = _load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
            dp = _product(DO, do_tile, V, v_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION)
            slope = dp - d_rows[:, None]
            e_tile = zeros
            if uq is not None:
                e_tile = _product(UQ, uq_tile, K, k_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION)
            if uk is not None:
                UK = (uk, uk_strides, cols, m)
                uk_tile = _load(UK, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
                e_tile = _product(Q, q_tile, UK, uk_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION)
                sum_q = tl.dot((p * slope).to(uk_tile.dtype), uk_tile, sum_q, input_precision=PRECISION)
            e_tile = e_tile * scale - e_rows[:, None]
            gs += e_tile * slope
            sum_do = tl.dot((p * e_tile).to(v_tile.dtype), v_tile, sum_do, input_precision=PRECISION)
        sum_q = tl.dot((p * gs).to(k_tile.dtype), k_tile, sum_q, input_precision=PRECISION)
    _store((_head(gq, gq_strides, batch, head), gq_strides, rows, n), sum_q * scale, BLOCK_D, D, WIDE)
    _store((_head(gdo, gdo_strides, batch, head), gdo_strides, rows, n), sum_do, BLOCK_DV, DV, WIDE)


@triton.jit
def _second_columns_kernel(
    uq, uk, uv, do, q, k, v, lse, delta, e, r, gk, gv,
    uq_strides, uk_strides, uv_strides, do_strides, q_strides, k_strides, v_strides, gk_strides, gv_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gK and gV, in tiles [columns, rows]."""
    batch, head, which, first = _place(m, heads, COLS, False)
    cols = first + tl.arange(0, COLS)
    zeros = tl.zeros([COLS, ROWS], tl.float32)
    q = _head(q, q_strides, batch, head)
    do = _head(do, do_strides, batch, head)
    if uq is not None:
        uq = _head(uq, uq_strides, batch, head)
    K = (_head(k, k_strides, batch, head), k_strides, cols, m)
    k_tile = _load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    V = (_head(v, v_strides, batch, head), v_strides, cols, m)
    v_tile = _load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    if uk is not None:
        UK = (_head(uk, uk_strides, batch, head), uk_strides, cols, m)
        uk_tile = _load(UK, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
    if uv is not None:
        UV = (_head(uv, uv_strides, batch, head), uv_strides, cols, m)
        uv_tile = _load(UV, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
    sum_k = tl.zeros([COLS, BLOCK_D], tl.float32)
    sum_v = tl.zeros([COLS, BLOCK_DV], tl.float32)
    begin = 0
    if CAUSAL:
        begin = first // ROWS * ROWS
    for start in range(begin, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        Q = (q, q_strides, rows, n)
        q_tile = _load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
        DO = (do, do_strides, rows, n)
        do_tile = _load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, WIDE)
        lse_rows = _statistic(lse, which, n, rows, float("inf")) * _LOG2_E
        logits = _product(K, k_tile, Q, q_tile, zeros, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION) * (scale * _LOG2_E)
        if CAUSAL:
            logits = tl.where(cols[:, None] <= rows[None, :], logits, float("-inf"))
        p = tl.exp2(logits - lse_rows[None, :])
        gs = zeros - _statistic(r, which, n, rows, 0.0)[None, :]
        if uv is not None:
            gs = _product(UV, uv_tile, DO, do_tile, gs, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION)
        if uq is not None or uk is not None:
            dp = _product(V, v_tile, DO, do_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, WIDE, PRECISION)
            slope = dp - _statistic(delta, which, n, rows, 0.0)[None, :]
            e_tile = zeros
            if uk is not None:
                e_tile = _product(UK, uk_tile, Q, q_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION)
            if uq is not None:
                UQ = (uq, uq_strides, rows, n)
                uq_tile = _load(UQ, 0, BLOCK_D, BLOCK_D, D, EVEN, WIDE)
                e_tile = _product(K, k_tile, UQ, uq_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, WIDE, PRECISION)
                sum_k = tl.dot((p * slope).to(uq_tile.dtype), uq_tile, sum_k, input_precision=PRECISION)
            e_tile = e_tile * scale - _statistic(e, which, n, rows, 0.0)[None, :]
            gs += e_tile * slope
            sum_v = tl.dot((p * e_tile).to(do_tile.dtype), do_tile, sum_v, input_precision=PRECISION)
        sum_k = tl.dot((p * gs).to(q_tile.dtype), q_tile, sum_k, input_precision=PRECISION)
    _store((_head(gk, gk_strides, batch, head), gk_strides, cols, m), sum_k * scale, BLOCK_D, D, WIDE)
    _store((_head(gv, gv_strides, batch, head), gv_strides, cols, m), sum_v, BLOCK_DV, DV, WIDE)


def _sweep(kernel: Any, op: str, arrays: dict[str, Tensor | None], scale: float, causal: bool) -> None:
    """Run `kernel` over the tiles of its rows or columns; arrays of four dimensions are passed with their strides."""
    q, v = arrays["q"], arrays["v"]
    assert q is not None and v is not None
    (batch, heads, n, d), (m, dv) = q.shape, v.shape[2:]
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (d, dv))
    precision = float32_precision()
    kind = "half" if q.dtype != torch.float32 else "tf32" if precision == "tf32" else "float32"
    tile = tiles.find(op, kind, max(block_d, block_dv), q.device)
    count, block = (m, tile.cols) if op.endswith("columns") else (n, tile.rows)
    strided = {name: x for name, x in arrays.items() if name not in ("lse", "delta", "e", "r")}
    strides = {f"{name}_strides": None if x is None else x.stride() for name, x in strided.items()}
    with on(q.device):
        kernel[(triton.cdiv(count, block) * batch * heads,)](
            **arrays, **strides, heads=heads, n=n, m=m, scale=scale, D=d, DV=dv, BLOCK_D=block_d, BLOCK_DV=block_dv,
            ROWS=tile.rows, COLS=tile.cols, CHUNK=min(tile.chunk, block_d, block_dv),
            EVEN=n % tile.rows == 0 and m % tile.cols == 0, WIDE=wide(*strided.values(), dims=2),
            CAUSAL=causal, PRECISION=precision, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _new_statistic(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(o, lse): softmax(scale q k^T) v, and the natural logarithm of each row's sum of exp(logits)."""
    *leading, n, _ = q.shape
    if q.stride(2) == 1 < q.stride(3):  # pixels last to first, as from a convolution: the output goes back into one
        o = torch.empty(*leading, v.shape[3], n, dtype=q.dtype, device=q.device).transpose(2, 3)
    else:
        o = torch.empty(*leading, n, v.shape[3], dtype=q.dtype, device=q.device)
    lse = _new_statistic(q)
    if k.shape[2] == 0:
        return o.zero_(), lse.fill_(-math.inf)
    if lse.numel():
        _sweep(_forward_kernel, "attention_forward", {"q": q, "k": k, "v": v, "o": o, "lse": lse}, scale, causal)
    return o, lse


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient `do` of `o`."""
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _new_statistic(q)
    if lse.numel() == 0 or k.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    arrays: dict[str, Tensor | None] = {"do": do, "q": q, "k": k, "v": v, "lse": lse, "delta": delta}
    _sweep(_backward_rows_kernel, "attention_backward_rows", {**arrays, "o": o, "dq": dq}, scale, causal)
    _sweep(_backward_columns_kernel, "attention_backward_columns", {**arrays, "dk": dk, "dv": dv}, scale, causal)
    return dq, dk, dv


def attention_second_backward(
    uq: Tensor | None, uk: Tensor | None, uv: Tensor | None,
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(gq, gk, gv, gdo) from the cotangents of dq, dk, dv, any of which may be None for zero."""
    gq, gk, gv, gdo = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(do)
    if lse.numel() == 0 or k.shape[2] == 0 or (uq is None and uk is None and uv is None):
        return gq.zero_(), gk.zero_(), gv.zero_(), gdo.zero_()
    delta, e, r = _new_statistic(q), _new_statistic(q), _new_statistic(q)
    arrays = {"uq": uq, "uk": uk, "uv": uv, "do": do, "q": q, "k": k, "v": v}
    arrays |= {"lse": lse, "delta": delta, "e": e, "r": r}
    _sweep(_second_statistics_kernel, "attention_second_statistics", {**arrays, "o": o}, scale, causal)
    _sweep(_second_rows_kernel, "attention_second_rows", {**arrays, "gq": gq, "gdo": gdo}, scale, causal)
    _sweep(_second_columns_kernel, "attention_second_columns", {**arrays, "gk": gk, "gv": gv}, scale, causal)
    return gq, gk, gv, gdo
