"""Kernels of the forward and the first backward of attention. The equations are in attention.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LOG2_E, head_of, load, load_statistic, mask_logits, product, store, tile_of_program


@triton.jit
def forward_kernel(
    q, k, v, o, lse,
    q_strides, k_strides, v_strides, o_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, which, first = tile_of_program(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = head_of(k, k_strides, batch, head)
    v = head_of(v, v_strides, batch, head)
    Q = (head_of(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
        logits = product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION) * (scale * LOG2_E)
        logits = mask_logits(logits, rows, cols, m, EVEN, CAUSAL)
        # Every row attends to column 0, in the first tile, so this is finite from the first tile on.
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        V = (v, v_strides, cols, m)
        v_tile = load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
        out = tl.dot(p.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision=PRECISION)
        highest = higher
    store((head_of(o, o_strides, batch, head), o_strides, rows, n), out / total[:, None], BLOCK_DV, DV, INT64)
    tl.store(lse + which * n + rows, (highest + tl.log2(total)) / LOG2_E, mask=rows < n)


@triton.jit
def backward_rows_kernel(
    do, q, k, v, o, lse, delta, dq,
    do_strides, q_strides, k_strides, v_strides, o_strides, dq_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and D for the columns kernel."""
    batch, head, which, first = tile_of_program(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = head_of(k, k_strides, batch, head)
    v = head_of(v, v_strides, batch, head)
    Q = (head_of(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    DO = (head_of(do, do_strides, batch, head), do_strides, rows, n)
    do_tile = load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
    OUT = (head_of(o, o_strides, batch, head), o_strides, rows, n)
    o_tile = load(OUT, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
    d_rows = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + which * n + rows, d_rows, mask=rows < n)
    lse_rows = load_statistic(lse, which, n, rows, float("inf")) * LOG2_E
    sum_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
        V = (v, v_strides, cols, m)
        v_tile = load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
        logits = product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION) * (scale * LOG2_E)
        logits = mask_logits(logits, rows, cols, m, EVEN, CAUSAL)
        p = tl.exp2(logits - lse_rows[:, None])
        slope = product(DO, do_tile, V, v_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION) - d_rows[:, None]
        sum_q = tl.dot((p * slope).to(k_tile.dtype), k_tile, sum_q, input_precision=PRECISION)
    store((head_of(dq, dq_strides, batch, head), dq_strides, rows, n), sum_q * scale, BLOCK_D, D, INT64)


@triton.jit
def backward_columns_kernel(
    do, q, k, v, lse, delta, dk, dv,
    do_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV. Tiles are [columns, rows], so that products over rows need no transposed P."""
    batch, head, which, first = tile_of_program(m, heads, COLS, False)
    cols = first + tl.arange(0, COLS)
    zeros = tl.zeros([COLS, ROWS], tl.float32)
    q = head_of(q, q_strides, batch, head)
    do = head_of(do, do_strides, batch, head)
    K = (head_of(k, k_strides, batch, head), k_strides, cols, m)
    k_tile = load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    V = (head_of(v, v_strides, batch, head), v_strides, cols, m)
    v_tile = load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
    sum_k = tl.zeros([COLS, BLOCK_D], tl.float32)
    sum_v = tl.zeros([COLS, BLOCK_DV], tl.float32)
    begin = 0
    if CAUSAL:
        begin = first // ROWS * ROWS
    for start in range(begin, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        Q = (q, q_strides, rows, n)
        q_tile = load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
        DO = (do, do_strides, rows, n)
        do_tile = load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
        lse_rows = load_statistic(lse, which, n, rows, float("inf")) * LOG2_E
        d_rows = load_statistic(delta, which, n, rows, 0.0)
        logits = product(K, k_tile, Q, q_tile, zeros, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION) * (scale * LOG2_E)
        if CAUSAL:
            logits = tl.where(cols[:, None] <= rows[None, :], logits, float("-inf"))
        p = tl.exp2(logits - lse_rows[None, :])
        sum_v = tl.dot(p.to(do_tile.dtype), do_tile, sum_v, input_precision=PRECISION)
        slope = product(V, v_tile, DO, do_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION) - d_rows[None, :]
        sum_k = tl.dot((p * slope).to(q_tile.dtype), q_tile, sum_k, input_precision=PRECISION)
    store((head_of(dk, dk_strides, batch, head), dk_strides, cols, m), sum_k * scale, BLOCK_D, D, INT64)
    store((head_of(dv, dv_strides, batch, head), dv_strides, cols, m), sum_v, BLOCK_DV, DV, INT64)
