"""act(x + bias) * gain and its derivatives, one pass each; what they compute is said in full in `fastgan.ops.bias_act`.

x is dense: [N C, pixels] in memory or, in channels_last, [N pixels, C]. A program takes tiles of such a plane of rows
and columns, so that a channel is found once for a row or a column, not for each element. Sums over all but the channels
are sums of the tiles' sums, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels.launch import channels_last, on

# Indices as in fastgan.ops.bias_act.ACTS.
LINEAR, RELU, LRELU, TANH, SIGMOID, SILU = (tl.constexpr(i) for i in range(6))

TILE = 4096  # elements


@triton.jit
def tanh(x):
    """Exact to rounding near 0 too, where 2 sigmoid(2x) - 1 is not: there a polynomial in x^2, fitted to |x| < 0.6."""
    t = x * x
    p = 0.0023735256 * t - 0.0084125641
    p = p * t + 0.0217891113
    p = p * t - 0.0539616540
    p = p * t + 0.1333331333
    p = p * t - 0.3333333323
    return tl.where(tl.abs(x) < 0.6, x + x * (t * p), 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def activate(x, slope, gain, ACT: tl.constexpr):
    """act(x) * gain of float32 x."""
    if ACT == RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == LRELU:
        x = tl.where(x < 0, x * slope, x)
    elif ACT == TANH:
        x = tanh(x)
    elif ACT == SIGMOID:
        x = tl.sigmoid(x)
    elif ACT == SILU:
        x = x * tl.sigmoid(x)
    return x * gain


@triton.jit
def slope_of_sign(y, slope, gain, ACT: tl.constexpr):
    """act' * gain of the piecewise linear acts, by the sign of their output."""
    if ACT == RELU:
        s = tl.where(y <= 0, 0.0, gain)  # the gradient of a NaN goes on
    elif ACT == LRELU:
        s = tl.where(y > 0, gain, gain * slope)
    else:
        s = tl.zeros_like(y) + gain
    return s


@triton.jit
def _curved(ref, gain, ACT: tl.constexpr):
    """act' and act'' of tanh and sigmoid by their output times gain, of silu by its input."""
    if ACT == TANH:
        y = ref / gain
        first = 1 - y * y
        second = -2 * y * first
    elif ACT == SIGMOID:
        y = ref / gain
        first = y * (1 - y)
        second = first * (1 - 2 * y)
    else:
        s = tl.sigmoid(ref)
        first = s * (1 + ref * (1 - s))
        second = s * (1 - s) * (2 + ref * (1 - 2 * s))
    return first, second


@triton.jit
def _tile(i, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, REPEAT: tl.constexpr, WIDE: tl.constexpr):
    """(row indices, column indices, offsets, mask) of the i-th of this program's tiles, one below the other."""
    across = tl.cdiv(cols, COLS)
    r = (tl.program_id(0) // across * REPEAT + i) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    if WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    return r, c, r[:, None] * cols + c[None, :], (r < rows)[:, None] & (c < cols)[None, :]


@triton.jit
def _bias_of(bias, r, c, rows, cols, channels, LAST: tl.constexpr):
    if LAST:
        b = tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    else:
        b = tl.load(bias + r % channels, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    return b


@triton.jit
def _forward_kernel(
    x, bias, y, rows, cols, channels, slope, gain,
    ACT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r, c, offsets, mask = _tile(0, rows, cols, ROWS, COLS, 1, WIDE)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += _bias_of(bias, r, c, rows, cols, channels, LAST)
    tl.store(y + offsets, activate(value, slope, gain, ACT).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    u, dy, ref, bias, dx, gx, partial, rows, cols, channels, slope, gain,
    ACT: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REPEAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = dy act' gain, or, given u: gdy = u act' gain into dx and gx = u dy act'' gain. SUM: of dx, or of gx.

    partial: [column tiles, rows], or in channels_last [row tiles / REPEAT, columns].
    """
    total = tl.zeros([COLS], tl.float32)
    for i in range(REPEAT):
        r, c, offsets, mask = _tile(i, rows, cols, ROWS, COLS, REPEAT, WIDE)
        value = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        if ACT >= TANH:
            at = tl.load(ref + offsets, mask=mask, other=0.0).to(tl.float32)
            if bias is not None:
                at += _bias_of(bias, r, c, rows, cols, channels, LAST)
            first, second = _curved(at, gain, ACT)
            if u is None:
                found = value * first * gain
                tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask=mask)
            else:
                cotangent = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) * gain
                tl.store(dx + offsets, (cotangent * first).to(dx.dtype.element_ty), mask=mask)
                found = cotangent * value * second
                tl.store(gx + offsets, found.to(gx.dtype.element_ty), mask=mask)
        else:
            if ACT == LINEAR:
                found = value * gain
            else:
                sign = tl.load(ref + offsets, mask=mask, other=0.0).to(tl.float32)
                found = value * slope_of_sign(sign, slope, gain, ACT)
            tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask=mask)
        if SUM:
            if LAST:
                total += tl.sum(tl.where(mask, found, 0.0), 0)
            else:
                place = (tl.program_id(0) % tl.cdiv(cols, COLS)).to(tl.int64) * rows + r
                tl.store(partial + place, tl.sum(tl.where(mask, found, 0.0), 1), mask=r < rows)
    if SUM and LAST:
        across = tl.cdiv(cols, COLS)
        c = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
        tl.store(partial + (tl.program_id(0) // across).to(tl.int64) * cols + c, total, mask=c < cols)


def _launch(kernel: Any, like: Tensor, bias: Tensor | None, want_bias: bool, **arguments: Any) -> Tensor:
    """Run over all tiles; returns the sum over all but the channels where it is wanted."""
    n, channels = like.shape[:2]
    last = False
    if bias is None and not want_bias:  # channels do not matter
        rows, cols = 1, like.numel()
    elif channels_last(like):
        rows, cols, last = like.numel() // channels, channels, True
    else:
        rows, cols = n * channels, like.numel() // (n * channels)
    block_cols = min(triton.next_power_of_2(cols), TILE)
    block_rows = min(TILE // block_cols, triton.next_power_of_2(rows))
    across, down = triton.cdiv(cols, block_cols), triton.cdiv(rows, block_rows)
    constants = {"LAST": last, "ROWS": block_rows, "COLS": block_cols, "WIDE": like.numel() + 4 * TILE >= 2**31}
    if kernel is _backward_kernel:
        # Sums in channels_last are one row for each program, which costs little where a program has many rows.
        repeat = 8 if want_bias and last and down >= 8192 else 1
        down = triton.cdiv(down, repeat)
        shape = (0,) if not want_bias else (down, 1, channels) if last else (across, n, channels)
        arguments["partial"] = partial = torch.empty(shape, dtype=torch.float32, device=like.device)
        constants |= {"SUM": want_bias, "REPEAT": repeat}
    with on(like.device):
        kernel[(across * down,)](
            bias=bias, rows=rows, cols=cols, channels=channels, **arguments, **constants,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum((0, 1)) if kernel is _backward_kernel and want_bias else like.new_empty(0, dtype=torch.float32)


def bias_act_forward(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    y = torch.empty_like(x)
    _launch(_forward_kernel, x, bias, False, x=x, y=y, slope=negative_slope, gain=gain, ACT=act)
    return y


def bias_act_backward(
    dy: Tensor, ref: Tensor | None, bias: Tensor | None, act: int, negative_slope: float, gain: float, want_bias: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(dy)
    settings = {"slope": negative_slope, "gain": gain, "ACT": act}
    return dx, _launch(_backward_kernel, dy, bias, want_bias, u=None, dy=dy, ref=ref, dx=dx, gx=None, **settings)


def bias_act_second_backward(
    u: Tensor,
    dy: Tensor,
    ref: Tensor,
    bias: Tensor | None,
    act: int,
    negative_slope: float,
    gain: float,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gdy, gx = torch.empty_like(dy), torch.empty_like(dy)
    settings = {"slope": negative_slope, "gain": gain, "ACT": act}
    return gdy, gx, _launch(_backward_kernel, dy, bias, want_bias, u=u, dy=dy, ref=ref, dx=gdy, gx=gx, **settings)
