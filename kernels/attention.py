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
from torch import Tensor

from fastgan.kernels import tiles
from fastgan.kernels.attention_first import backward_columns_kernel, backward_rows_kernel, forward_kernel
from fastgan.kernels.attention_second import second_columns_kernel, second_rows_kernel, second_statistics_kernel
from fastgan.kernels.launch import float32_precision, on, wide


def _sweep(kernel: Any, op: str, arrays: dict[str, Tensor | None], scale: float, causal: bool) -> None:
    """Run `kernel` over the tiles of its rows or columns; arrays of four dimensions are passed with their strides."""
    q, v = arrays["q"], arrays["v"]
    assert q is not None and v is not None
    (batch, heads, n, d), (m, dv) = q.shape, v.shape[2:]
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (d, dv))
    precision = float32_precision()
    kind = "half" if q.dtype != torch.float32 else "tf32" if precision == "tf32" else "float32"
    strided = {name: x for name, x in arrays.items() if name not in ("lse", "delta", "e", "r")}
    strides = {f"{name}_strides": None if x is None else x.stride() for name, x in strided.items()}
    odd = any(step % 16 and step != 1 for steps in strides.values() if steps for step in steps)
    tile = tiles.find(op, kind, max(block_d, block_dv), q.device, odd)
    fewer = min(block_d, block_dv)
    if op.endswith("rows") and kind == "float32" and block_d != block_dv:
        fewer = max(16, fewer // 2)  # whole, the smaller operands spill beside the larger ones
    count, block = (m, tile.cols) if op.endswith("columns") else (n, tile.rows)
    with on(q.device):
        kernel[(triton.cdiv(count, block) * batch * heads,)](
            **arrays, **strides, heads=heads, n=n, m=m, scale=scale, D=d, DV=dv, BLOCK_D=block_d, BLOCK_DV=block_dv,
            ROWS=tile.rows, COLS=tile.cols, CHUNK=min(tile.chunk, fewer),
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
        _sweep(forward_kernel, "attention_forward", {"q": q, "k": k, "v": v, "o": o, "lse": lse}, scale, causal)
    return o, lse


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient `do` of `o`."""
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _new_statistic(q)
    if lse.numel() == 0 or k.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    arrays: dict[str, Tensor | None] = {"do": do, "q": q, "k": k, "v": v, "lse": lse, "delta": delta}
    _sweep(backward_rows_kernel, "attention_backward_rows", {**arrays, "o": o, "dq": dq}, scale, causal)
    _sweep(backward_columns_kernel, "attention_backward_columns", {**arrays, "dk": dk, "dv": dv}, scale, causal)
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
    _sweep(second_statistics_kernel, "attention_second_statistics", {**arrays, "o": o}, scale, causal)
    _sweep(second_rows_kernel, "attention_second_rows", {**arrays, "gq": gq, "gdo": gdo}, scale, causal)
    _sweep(second_columns_kernel, "attention_second_columns", {**arrays, "gk": gk, "gv": gv}, scale, causal)
    return gq, gk, gv, gdo
