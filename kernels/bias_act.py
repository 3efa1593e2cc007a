"""y = act(x + bias) * gain with its first and second derivatives, in one pass each.

`fastgan.ops.bias_act` has the equations and documents the arguments. x [N, C, ...] is dense: in memory it is a matrix
[N C, pixels] or, in channels_last (LAST), [N pixels, C]. A program takes tiles of this matrix, so that the channel is
computed once per row or column, not per element. float32, float16 or bfloat16; arithmetic and sums are float32. The
gradient of the bias is the sum of the tiles' sums in a fixed order: results are bit-identical between runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, ceil_div, channels_last, next_power_of_2

# Indices as in fastgan.ops.bias_act.ACTS.
LINEAR, RELU, LRELU, TANH, SIGMOID, SILU = (tl.constexpr(i) for i in range(6))

TILE = 4096  # elements


@triton.jit
def tanh(x):
    """tanh to float32 rounding: 2 sigmoid(2x) - 1, and for |x| < 0.6, where that cancels, a fitted odd polynomial."""
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
def slope_from_sign(y, slope, gain, ACT: tl.constexpr):
    """act' * gain of the piecewise linear acts, from the sign of their output."""
    if ACT == RELU:
        s = tl.where(y <= 0, 0.0, gain)  # the gradient passes through a NaN
    elif ACT == LRELU:
        s = tl.where(y > 0, gain, gain * slope)
    else:
        s = tl.zeros_like(y) + gain
    return s


@triton.jit
def _derivatives_of_smooth_act(ref, gain, ACT: tl.constexpr):
    """act' and act'' of tanh and sigmoid, from the output times gain, or of silu, from the input."""
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
def _tile(i, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, REPEAT: tl.constexpr, INT64: tl.constexpr):
    """Row indices, column indices, offsets and mask of the i-th of this program's tiles, stacked along rows."""
    across = tl.cdiv(cols, COLS)
    r = (tl.program_id(0) // across * REPEAT + i) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    if INT64:
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
    ACT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    r, c, offsets, mask = _tile(0, rows, cols, ROWS, COLS, 1, INT64)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += _bias_of(bias, r, c, rows, cols, channels, LAST)
    tl.store(y + offsets, activate(value, slope, gain, ACT).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    u, dy, ref, bias, dx, gx, partial, rows, cols, channels, slope, gain,
    ACT: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REPEAT: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """dx = dy act' gain; if u is not None, gdy = u act' gain (stored in dx) and gx = u dy act'' gain.

    With SUM, `partial` gets the sums of dx (or gx): [column tiles, rows], or in channels_last [row tiles / REPEAT,
    columns].
    """
    total = tl.zeros([COLS], tl.float32)
    for i in range(REPEAT):
        r, c, offsets, mask = _tile(i, rows, cols, ROWS, COLS, REPEAT, INT64)
        value = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        if ACT >= TANH:
            at = tl.load(ref + offsets, mask=mask, other=0.0).to(tl.float32)
            if bias is not None:
                at += _bias_of(bias, r, c, rows, cols, channels, LAST)
            first, second = _derivatives_of_smooth_act(at, gain, ACT)
            if u is None:
                result = value * first * gain
                tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
            else:
                cotangent = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) * gain
                tl.store(dx + offsets, (cotangent * first).to(dx.dtype.element_ty), mask=mask)
                result = cotangent * value * second
                tl.store(gx + offsets, result.to(gx.dtype.element_ty), mask=mask)
        else:
            if ACT == LINEAR:
                result = value * gain
            else:
                sign = tl.load(ref + offsets, mask=mask, other=0.0).to(tl.float32)
                result = value * slope_from_sign(sign, slope, gain, ACT)
            tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
        if SUM:
            if LAST:
                total += tl.sum(tl.where(mask, result, 0.0), 0)
            else:
                place = (tl.program_id(0) % tl.cdiv(cols, COLS)).to(tl.int64) * rows + r
                tl.store(partial + place, tl.sum(tl.where(mask, result, 0.0), 1), mask=r < rows)
    if SUM and LAST:
        across = tl.cdiv(cols, COLS)
        c = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
        tl.store(partial + (tl.program_id(0) // across).to(tl.int64) * cols + c, total, mask=c < cols)


@functools.lru_cache(maxsize=4096)
def _plan(rows: int, cols: int, last: bool, backward: bool, want_bias: bool, channels: int, tile: int) -> Plan:
    block_cols = min(next_power_of_2(cols), tile)
    block_rows = min(tile // block_cols, next_power_of_2(rows))
    across, down = ceil_div(cols, block_cols), ceil_div(rows, block_rows)
    constants = {
        "rows": rows, "cols": cols, "channels": channels, "LAST": last, "ROWS": block_rows, "COLS": block_cols,
        "INT64": rows * cols + 4 * tile >= 2**31, "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    if not backward:
        return Plan((across * down,), constants)
    # In channels_last each program writes a row of sums, which is cheap if it has many rows of x.
    repeat = 8 if want_bias and last and down >= 8192 else 1
    down = ceil_div(down, repeat)
    shape = (0,) if not want_bias else (down, 1, channels) if last else (across, rows // channels, channels)
    return Plan((across * down,), {**constants, "SUM": want_bias, "REPEAT": repeat}, shape)


def _launch(kernel: Any, like: Tensor, bias: Tensor | None, want_bias: bool, **arguments: Any) -> Any:
    """Launch over all tiles.

    Returns:
        Of a backward the sum over all dimensions but C, float32 [C], or [0] if it is not wanted.
    """
    n, channels = like.shape[:2]
    last = False
    if bias is None and not want_bias:  # channels do not matter
        rows, cols = 1, like.numel()
    elif channels_last(like):
        rows, cols, last = like.numel() // channels, channels, True
    else:
        rows, cols = n * channels, like.numel() // (n * channels)
    backward = "dx" in arguments
    plan = _plan(rows, cols, last, backward, want_bias, channels, TILE)
    partial = None
    if backward:
        arguments["partial"] = partial = torch.empty(plan.partial, dtype=torch.float32, device=like.device)
    plan.launch(kernel, like.device, bias=bias, **arguments)
    return partial.sum((0, 1)) if partial is not None and want_bias else partial


def bias_act_forward(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    """y = act(x + bias) * gain.

    Args:
        x: [N, C, ...], contiguous or channels_last.
        bias: [C], float32 or the dtype of x.
        act: index into `fastgan.ops.bias_act.ACTS`.
        negative_slope: slope of lrelu below 0.
        gain: factor of the result.

    Returns:
        y, like x.
    """
    y = torch.empty_like(x)
    _launch(_forward_kernel, x, bias, False, x=x, y=y, slope=negative_slope, gain=gain, ACT=act)
    return y


def bias_act_backward(
    dy: Tensor, ref: Tensor | None, bias: Tensor | None, act: int, negative_slope: float, gain: float, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """First backward.

    Args:
        dy: gradient of y.
        ref: y, or x for silu; None for linear.
        bias: as in `bias_act_forward`, for silu only.
        act, negative_slope, gain: as in `bias_act_forward`.
        want_bias: whether to compute the gradient of the bias.

    Returns:
        dx, like dy, and the gradient of the bias, float32 [C], or [0] if not wanted.
    """
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
    """Second backward, for acts that are not piecewise linear: gradients of <u, dx>.

    Args:
        u: cotangent of dx.
        dy, ref, bias, act, negative_slope, gain, want_bias: as in `bias_act_backward`.

    Returns:
        gdy and gx, like dy, and the gradient of the bias, float32 [C], or [0] if not wanted.
    """
    gdy, gx = torch.empty_like(dy), torch.empty_like(dy)
    settings = {"slope": negative_slope, "gain": gain, "ACT": act}
    return gdy, gx, _launch(_backward_kernel, dy, bias, want_bias, u=u, dy=dy, ref=ref, dx=gdy, gx=gx, **settings)
