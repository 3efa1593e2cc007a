"""Kernels of the second backward of attention. The equations are in attention.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LOG2_E, head_of, load, load_statistic, mask_logits, product, store, tile_of_program


@triton.jit
def second_statistics_kernel(
    uq, uk, uv, do, q, k, v, o, lse, delta, e, r,
    uq_strides, uk_strides, uv_strides, do_strides, q_strides, k_strides, v_strides, o_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D, e and r. Here and in the two kernels below, products with a cotangent that is None are skipped."""
    batch, head, which, first = tile_of_program(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = head_of(k, k_strides, batch, head)
    v = head_of(v, v_strides, batch, head)
    if uk is not None:
        uk = head_of(uk, uk_strides, batch, head)
    if uv is not None:
        uv = head_of(uv, uv_strides, batch, head)
    Q = (head_of(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    DO = (head_of(do, do_strides, batch, head), do_strides, rows, n)
    do_tile = load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
    if uq is not None:
        UQ = (head_of(uq, uq_strides, batch, head), uq_strides, rows, n)
        uq_tile = load(UQ, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    OUT = (head_of(o, o_strides, batch, head), o_strides, rows, n)
    o_tile = load(OUT, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
    d_rows = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + which * n + rows, d_rows, mask=rows < n)
    lse_rows = load_statistic(lse, which, n, rows, float("inf")) * LOG2_E
    e_rows = tl.zeros([ROWS], tl.float32)
    r_rows = tl.zeros([ROWS], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
        logits = product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION) * (scale * LOG2_E)
        logits = mask_logits(logits, rows, cols, m, EVEN, CAUSAL)
        p = tl.exp2(logits - lse_rows[:, None])
        if uv is not None:
            UV = (uv, uv_strides, cols, m)
            uv_tile = load(UV, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
            f_tile = product(DO, do_tile, UV, uv_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION)
            r_rows += tl.sum(p * f_tile, 1)
        if uq is not None or uk is not None:
            e_tile = zeros
            if uq is not None:
                e_tile = product(UQ, uq_tile, K, k_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION)
            if uk is not None:
                UK = (uk, uk_strides, cols, m)
                uk_tile = load(UK, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
                e_tile = product(Q, q_tile, UK, uk_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION)
            pe = p * e_tile * scale
            e_rows += tl.sum(pe, 1)
            V = (v, v_strides, cols, m)
            v_tile = load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
            dp = product(DO, do_tile, V, v_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION)
            r_rows += tl.sum(pe * (dp - d_rows[:, None]), 1)
    tl.store(e + which * n + rows, e_rows, mask=rows < n)
    tl.store(r + which * n + rows, r_rows, mask=rows < n)


@triton.jit
def second_rows_kernel(
    uq, uk, uv, do, q, k, v, lse, delta, e, r, gq, gdo,
    uq_strides, uk_strides, uv_strides, do_strides, q_strides, k_strides, v_strides, gq_strides, gdo_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gQ and gdO."""
    batch, head, which, first = tile_of_program(n, heads, ROWS, CAUSAL)
    rows = first + tl.arange(0, ROWS)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    k = head_of(k, k_strides, batch, head)
    v = head_of(v, v_strides, batch, head)
    if uk is not None:
        uk = head_of(uk, uk_strides, batch, head)
    if uv is not None:
        uv = head_of(uv, uv_strides, batch, head)
    Q = (head_of(q, q_strides, batch, head), q_strides, rows, n)
    q_tile = load(Q, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    DO = (head_of(do, do_strides, batch, head), do_strides, rows, n)
    do_tile = load(DO, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
    if uq is not None:
        UQ = (head_of(uq, uq_strides, batch, head), uq_strides, rows, n)
        uq_tile = load(UQ, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    lse_rows = load_statistic(lse, which, n, rows, float("inf")) * LOG2_E
    d_rows = load_statistic(delta, which, n, rows, 0.0)
    e_rows = load_statistic(e, which, n, rows, 0.0)
    r_rows = load_statistic(r, which, n, rows, 0.0)
    sum_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_do = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        K = (k, k_strides, cols, m)
        k_tile = load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
        logits = product(Q, q_tile, K, k_tile, zeros, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION) * (scale * LOG2_E)
        logits = mask_logits(logits, rows, cols, m, EVEN, CAUSAL)
        p = tl.exp2(logits - lse_rows[:, None])
        gs = zeros - r_rows[:, None]  # gS / P, summed over the terms that are present
        if uv is not None:
            UV = (uv, uv_strides, cols, m)
            uv_tile = load(UV, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
            gs = product(DO, do_tile, UV, uv_tile, gs, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION)
            sum_do = tl.dot(p.to(uv_tile.dtype), uv_tile, sum_do, input_precision=PRECISION)
        if uq is not None or uk is not None:
            V = (v, v_strides, cols, m)
            v_tile = load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
            dp = product(DO, do_tile, V, v_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION)
            slope = dp - d_rows[:, None]
            e_tile = zeros
            if uq is not None:
                e_tile = product(UQ, uq_tile, K, k_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION)
            if uk is not None:
                UK = (uk, uk_strides, cols, m)
                uk_tile = load(UK, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
                e_tile = product(Q, q_tile, UK, uk_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION)
                sum_q = tl.dot((p * slope).to(uk_tile.dtype), uk_tile, sum_q, input_precision=PRECISION)
            e_tile = e_tile * scale - e_rows[:, None]
            gs += e_tile * slope
            sum_do = tl.dot((p * e_tile).to(v_tile.dtype), v_tile, sum_do, input_precision=PRECISION)
        sum_q = tl.dot((p * gs).to(k_tile.dtype), k_tile, sum_q, input_precision=PRECISION)
    store((head_of(gq, gq_strides, batch, head), gq_strides, rows, n), sum_q * scale, BLOCK_D, D, INT64)
    store((head_of(gdo, gdo_strides, batch, head), gdo_strides, rows, n), sum_do, BLOCK_DV, DV, INT64)


@triton.jit
def second_columns_kernel(
    uq, uk, uv, do, q, k, v, lse, delta, e, r, gk, gv,
    uq_strides, uk_strides, uv_strides, do_strides, q_strides, k_strides, v_strides, gk_strides, gv_strides,
    heads, n, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, INT64: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gK and gV, in tiles [columns, rows]."""
    batch, head, which, first = tile_of_program(m, heads, COLS, False)
    cols = first + tl.arange(0, COLS)
    zeros = tl.zeros([COLS, ROWS], tl.float32)
    q = head_of(q, q_strides, batch, head)
    do = head_of(do, do_strides, batch, head)
    if uq is not None:
        uq = head_of(uq, uq_strides, batch, head)
    K = (head_of(k, k_strides, batch, head), k_strides, cols, m)
    k_tile = load(K, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    V = (head_of(v, v_strides, batch, head), v_strides, cols, m)
    v_tile = load(V, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
    if uk is not None:
        UK = (head_of(uk, uk_strides, batch, head), uk_strides, cols, m)
        uk_tile = load(UK, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
    if uv is not None:
        UV = (head_of(uv, uv_strides, batch, head), uv_strides, cols, m)
        uv_tile = load(UV, 0, BLOCK_DV, BLOCK_DV, DV, EVEN, INT64)
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
        logits = product(K, k_tile, Q, q_tile, zeros, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION) * (scale * LOG2_E)
        if CAUSAL:
            logits = tl.where(cols[:, None] <= rows[None, :], logits, float("-inf"))
        p = tl.exp2(logits - lse_rows[None, :])
        gs = zeros - load_statistic(r, which, n, rows, 0.0)[None, :]
        if uv is not None:
            gs = product(UV, uv_tile, DO, do_tile, gs, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION)
        if uq is not None or uk is not None:
            dp = product(V, v_tile, DO, do_tile, zeros, BLOCK_DV, DV, CHUNK, EVEN, INT64, PRECISION)
            slope = dp - load_statistic(delta, which, n, rows, 0.0)[None, :]
            e_tile = zeros
            if uk is not None:
                e_tile = product(UK, uk_tile, Q, q_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION)
            if uq is not None:
                UQ = (uq, uq_strides, rows, n)
                uq_tile = load(UQ, 0, BLOCK_D, BLOCK_D, D, EVEN, INT64)
                e_tile = product(K, k_tile, UQ, uq_tile, e_tile, BLOCK_D, D, CHUNK, EVEN, INT64, PRECISION)
                sum_k = tl.dot((p * slope).to(uq_tile.dtype), uq_tile, sum_k, input_precision=PRECISION)
            e_tile = e_tile * scale - load_statistic(e, which, n, rows, 0.0)[None, :]
            gs += e_tile * slope
            sum_v = tl.dot((p * e_tile).to(do_tile.dtype), do_tile, sum_v, input_precision=PRECISION)
        sum_k = tl.dot((p * gs).to(q_tile.dtype), q_tile, sum_k, input_precision=PRECISION)
    store((head_of(gk, gk_strides, batch, head), gk_strides, cols, m), sum_k * scale, BLOCK_D, D, INT64)
    store((head_of(gv, gv_strides, batch, head), gv_strides, cols, m), sum_v, BLOCK_DV, DV, INT64)
