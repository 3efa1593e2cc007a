"""Softmax attention with its first and second derivatives, tile by tile: of [N, M] only row statistics reach memory.

The tiling follows FlashAttention (Dao et al., 2022, arXiv:2205.14135). Products, softmax and all sums are float32.

    S = scale Q K^T      P = softmax(S)      O = P V
    first backward, given dO:
      dP = dO V^T      D = rowsum(dO * O)      dS = P * (dP - D)
      dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO
    second backward, given the cotangents uQ, uK, uV of dQ, dK, dV:
      E = scale (uQ K^T + Q uK^T)      F = dO uV^T      e = rowsum(P * E)      r = rowsum(P * (F + E * (dP - D)))
      gdO = [P * (E - e)] V + P uV
      gS = P * (F + (E - e) * (dP - D) - r)
      gQ = scale (gS K + dS uK)      gK = scale (gS^T Q + dS^T uQ)      gV = [P * (E - e)]^T dO

(r here is the r of the usual form plus e D, which cancels against e dP - e D in gS.) Each kernel recomputes P from the
log-sum-exp of its rows. Rows (queries) and columns (keys) are handled by different programs, each of which owns its
outputs: there are no atomics, and results are bit-identical between runs.

Shapes: q, uq [B, H, N, d]; k, uk [B, H, M, d]; v, uv [B, H, M, dv]; o, do [B, H, N, dv]; any strides; float32, float16
or bfloat16, the same dtype for all tensors of a call. Row statistics are float32 [B, H, N]. d and dv are 1 to 256.
`causal`: row i attends to columns j <= i (aligned at the top left).
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .attention_first import backward_columns_kernel, backward_rows_kernel, forward_kernel
from .attention_second import second_columns_kernel, second_rows_kernel, second_statistics_kernel
from .launch import Plan, ceil_div, kind_of, needs_int64_offsets, next_power_of_2

Strides = tuple[tuple[int, ...] | None, ...]


@functools.lru_cache(maxsize=4096)
def _plan(
    op: str, where: tiles.Place, kind: str, precision: str, causal: bool, shape: tuple[int, ...], m: int, dv: int,
    names: tuple[str, ...], strides: Strides,
) -> Plan:  # fmt: skip
    """The launch of a kernel for q of `shape`, v [B, H, m, dv] and arrays of these names and strides."""
    batch, heads, n, d = shape
    block_d, block_dv = (max(16, next_power_of_2(size)) for size in (d, dv))
    odd = any(step % 16 and step != 1 for steps in strides if steps for step in steps)
    tile = tiles.lookup(op, kind, max(block_d, block_dv), where, odd)
    chunk = min(tile.chunk, block_d, block_dv)
    if op.endswith("rows") and kind == "float32" and block_d != block_dv:
        chunk = min(tile.chunk, max(16, min(block_d, block_dv) // 2))  # with full chunks the smaller operands spill
    count, block = (m, tile.cols) if op.endswith("columns") else (n, tile.rows)
    largest = (max(n, m), max(d, dv))
    return Plan((ceil_div(count, block) * batch * heads,), {
        **{f"{name}_strides": steps for name, steps in zip(names, strides, strict=True)},
        "heads": heads, "n": n, "m": m, "D": d, "DV": dv, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "ROWS": tile.rows, "COLS": tile.cols, "CHUNK": chunk, "EVEN": n % tile.rows == 0 and m % tile.cols == 0,
        "INT64": needs_int64_offsets(*((largest, steps) for steps in strides if steps), dims=2),
        "CAUSAL": causal, "PRECISION": precision,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    })  # fmt: skip


def _sweep(
    numbers: tuple[str, str], scale: float, causal: bool, statistics: dict[str, Tensor],
    kernel: Any, op: str, arrays: dict[str, Tensor | None],
) -> None:  # fmt: skip
    """Launch `kernel` over the tiles of its rows or columns. Arrays are passed with their strides."""
    q, v = arrays["q"], arrays["v"]
    assert q is not None and v is not None
    m, dv = v.shape[2:]
    strides = tuple([None if x is None else x.stride() for x in arrays.values()])
    plan = _plan(op, tiles.place(op, q.device), *numbers, causal, q.shape, m, dv, tuple(arrays), strides)
    plan.launch(kernel, q.device, scale=scale, **arrays, **statistics)


def _new_statistic(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Compute o = softmax(scale q k^T) v.

    Args:
        q: [B, H, N, d].
        k: [B, H, M, d].
        v: [B, H, M, dv].
        scale: factor of the logits.
        causal: whether row i attends only to columns j <= i.

    Returns:
        o: [B, H, N, dv], in the dtype of q.
        lse: float32 [B, H, N], the log-sum-exp of each row of logits.
    """
    *leading, n, _ = q.shape
    if q.stride(2) == 1 < q.stride(3):  # features before pixels, as from a convolution: the output gets the same order
        o = torch.empty(*leading, v.shape[3], n, dtype=q.dtype, device=q.device).transpose(2, 3)
    else:
        o = torch.empty(*leading, n, v.shape[3], dtype=q.dtype, device=q.device)
    lse = _new_statistic(q)
    if k.shape[2] == 0:
        return o.zero_(), lse.fill_(-math.inf)
    if lse.numel():
        sweep = partial(_sweep, kind_of(q.dtype, "matmul"), scale, causal, {"lse": lse})
        sweep(forward_kernel, "attention_forward", {"q": q, "k": k, "v": v, "o": o})
    return o, lse


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """First backward.

    Args:
        do: gradient of o, [B, H, N, dv].
        q, k, v, scale, causal: as in `attention_forward`.
        o, lse: its results.

    Returns:
        dq, dk, dv: gradients, in the shapes and dtype of q, k and v.
    """
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _new_statistic(q)
    if lse.numel() == 0 or k.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    arrays: dict[str, Tensor | None] = {"do": do, "q": q, "k": k, "v": v}
    sweep = partial(_sweep, kind_of(q.dtype, "matmul"), scale, causal, {"lse": lse, "delta": delta})
    sweep(backward_rows_kernel, "attention_backward_rows", {**arrays, "o": o, "dq": dq})
    sweep(backward_columns_kernel, "attention_backward_columns", {**arrays, "dk": dk, "dv": dv})
    return dq, dk, dv


def attention_second_backward(
    uq: Tensor | None, uk: Tensor | None, uv: Tensor | None,
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Second backward: the backward of `attention_backward`, whose o and lse are functions of q, k and v.

    Args:
        uq, uk, uv: cotangents of dq, dk and dv; None means zero.
        do, q, k, v, o, lse, scale, causal: as in `attention_backward`.

    Returns:
        gq, gk, gv, gdo: gradients, in the shapes and dtype of q, k, v and do.
    """
    gq, gk, gv, gdo = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(do)
    if lse.numel() == 0 or k.shape[2] == 0 or (uq is None and uk is None and uv is None):
        return gq.zero_(), gk.zero_(), gv.zero_(), gdo.zero_()
    delta, e, r = _new_statistic(q), _new_statistic(q), _new_statistic(q)
    arrays = {"uq": uq, "uk": uk, "uv": uv, "do": do, "q": q, "k": k, "v": v}
    statistics = {"lse": lse, "delta": delta, "e": e, "r": r}
    sweep = partial(_sweep, kind_of(q.dtype, "matmul"), scale, causal, statistics)
    sweep(second_statistics_kernel, "attention_second_statistics", {**arrays, "o": o})
    sweep(second_rows_kernel, "attention_second_rows", {**arrays, "gq": gq, "gdo": gdo})
    sweep(second_columns_kernel, "attention_second_columns", {**arrays, "gk": gk, "gv": gv})
    return gq, gk, gv, gdo
