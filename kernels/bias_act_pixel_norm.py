"""y = z r with z = act(x + bias) * gain and r = (mean over C of z^2 + eps)^(-1/2), with both derivatives.

Pixel norm is from Karras et al., "Progressive Growing of GANs" (2017, arXiv:1710.10196). The equations are in
`fastgan.ops.bias_act_pixel_norm`. x [N, C, ...] is dense; float32, float16 or bfloat16; arithmetic, sums
and r are float32. act is piecewise linear.

A program takes the full feature vectors of a few pixels and reads every input once. Vectors too long for registers are
read twice: those of more than 4096 channels, or, in contiguous memory, where tiles need neighboring pixels, of more
than 512 to 2048, depending on dtype and pass. The gradient of the bias is the sum of the programs' sums in a fixed
order: results are bit-identical between runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act import activate, slope_from_sign
from .launch import Plan, ceil_div, channels_last, next_power_of_2

TILE = 8192  # elements
LARGEST = 4096  # channels that fit in registers
_SECTOR = 32  # bytes of a memory transaction


@triton.jit
def _pixels(i, per_sample, PIXELS: tl.constexpr, REPEAT: tl.constexpr):
    """Sample and pixels of the i-th of this program's tiles. channels_last counts as one sample."""
    groups = tl.cdiv(per_sample, PIXELS * REPEAT)
    group = tl.program_id(0) % groups
    return tl.program_id(0) // groups, (group * REPEAT + i) * PIXELS + tl.arange(0, PIXELS)


@triton.jit
def _at(sample, p, first, per_sample, step_p, step_c, C: tl.constexpr, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """Channels, offsets [pixels, channels], and mask."""
    c = first + tl.arange(0, BLOCK)
    mask = (p < per_sample)[:, None] & (c < C)[None, :]
    if INT64:
        p = p.to(tl.int64)
        c = c.to(tl.int64)
    return c, sample.to(tl.int64) * per_sample * C + p[:, None] * step_p + c[None, :] * step_c, mask


@triton.jit
def _load(base, offsets, mask):
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _activated(x, bias, c, offsets, mask, slope, gain, ACT: tl.constexpr, C: tl.constexpr):
    """act(x + bias) * gain, 0 outside of the mask."""
    value = _load(x, offsets, mask)
    if bias is not None:
        value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, activate(value, slope, gain, ACT), 0.0)


# Long feature vectors are read twice, in loops that are not unrolled: unrolled, all loads would come first and spill.
@triton.jit
def _forward_kernel(
    x, bias, y, r, per_sample, step_p, step_c, slope, gain, eps,
    ACT: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    sample, p = _pixels(0, per_sample, PIXELS, 1)
    if C > BLOCK:
        squares = tl.zeros([PIXELS], tl.float32)
        for first in range(0, C, BLOCK):
            c, offsets, mask = _at(sample, p, first, per_sample, step_p, step_c, C, BLOCK, INT64)
            value = _activated(x, bias, c, offsets, mask, slope, gain, ACT, C)
            squares += tl.sum(value * value, 1)
    else:
        c, offsets, mask = _at(sample, p, 0, per_sample, step_p, step_c, C, BLOCK, INT64)
        value = _activated(x, bias, c, offsets, mask, slope, gain, ACT, C)
        squares = tl.sum(value * value, 1)
    scale = 1 / tl.sqrt(squares / C + eps)
    tl.store(r + sample.to(tl.int64) * per_sample + p, scale, mask=p < per_sample)
    if C > BLOCK:
        for first in range(0, C, BLOCK):
            c, offsets, mask = _at(sample, p, first, per_sample, step_p, step_c, C, BLOCK, INT64)
            value = _activated(x, bias, c, offsets, mask, slope, gain, ACT, C)
            tl.store(y + offsets, (value * scale[:, None]).to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(y + offsets, (value * scale[:, None]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _inputs(u, dy, y, offsets, mask, slope, gain, ACT: tl.constexpr):
    """y, dy, and u act' gain (dy if u is None)."""
    out = _load(y, offsets, mask)
    grad = _load(dy, offsets, mask)
    v = grad
    if u is not None:
        v = _load(u, offsets, mask) * slope_from_sign(out, slope, gain, ACT)
    return out, grad, v


@triton.jit
def _outputs(
    u, dx, gx, out, grad, v, scale, m, q, s, offsets, mask, slope, gain, ACT: tl.constexpr
):  # fmt: skip
    """Store the results. Returns the summands of the bias gradient, 0 outside of the mask."""
    if u is None:
        result = scale * (grad - out * m) * slope_from_sign(out, slope, gain, ACT)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    else:
        tl.store(dx + offsets, (scale * (v - out * q)).to(dx.dtype.element_ty), mask=mask)
        result = scale * scale * (out * (3 * q * m - s) - v * m - grad * q)
        result *= slope_from_sign(out, slope, gain, ACT)
        tl.store(gx + offsets, result.to(gx.dtype.element_ty), mask=mask)
    return tl.where(mask, result, 0.0)


@triton.jit
def _backward_kernel(
    u, dy, y, r, dx, gx, partial, per_sample, step_p, step_c, slope, gain,
    ACT: tl.constexpr, SUM: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    REPEAT: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """dx; if u is not None, gdy (stored in dx) and gx. With SUM, sums of dx (or gx) into partial [programs, C]."""
    partial += tl.program_id(0).to(tl.int64) * C
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(REPEAT):
        sample, p = _pixels(i, per_sample, PIXELS, REPEAT)
        scale = _load(r, sample.to(tl.int64) * per_sample + p, p < per_sample)[:, None]
        if C > BLOCK:  # REPEAT is 1
            m = tl.zeros([PIXELS], tl.float32)
            q = tl.zeros([PIXELS], tl.float32)
            s = tl.zeros([PIXELS], tl.float32)
            for first in range(0, C, BLOCK):
                c, offsets, mask = _at(sample, p, first, per_sample, step_p, step_c, C, BLOCK, INT64)
                out, grad, v = _inputs(u, dy, y, offsets, mask, slope, gain, ACT)
                m += tl.sum(grad * out, 1)
                if u is not None:
                    q += tl.sum(v * out, 1)
                    s += tl.sum(v * grad, 1)
        else:
            c, offsets, mask = _at(sample, p, 0, per_sample, step_p, step_c, C, BLOCK, INT64)
            out, grad, v = _inputs(u, dy, y, offsets, mask, slope, gain, ACT)
            m = tl.sum(grad * out, 1)
            q = m
            s = m
            if u is not None:
                q = tl.sum(v * out, 1)
                s = tl.sum(v * grad, 1)
        m = (m / C)[:, None]
        q = (q / C)[:, None]
        s = (s / C)[:, None]
        if C > BLOCK:
            for first in range(0, C, BLOCK):
                c, offsets, mask = _at(sample, p, first, per_sample, step_p, step_c, C, BLOCK, INT64)
                out, grad, v = _inputs(u, dy, y, offsets, mask, slope, gain, ACT)
                result = _outputs(u, dx, gx, out, grad, v, scale, m, q, s, offsets, mask, slope, gain, ACT)
                if SUM:
                    tl.store(partial + c, tl.sum(result, 0), mask=c < C)
        else:
            result = _outputs(u, dx, gx, out, grad, v, scale, m, q, s, offsets, mask, slope, gain, ACT)
            if SUM:
                total += tl.sum(result, 0)
    if SUM and C <= BLOCK:
        c = tl.arange(0, BLOCK)
        tl.store(partial + c, total, mask=c < C)


@functools.lru_cache(maxsize=4096)
def _plan(
    samples: int,
    per_sample: int,
    channels: int,
    pixels_are_neighbors: bool,
    element_size: int,
    backward: bool,
    second: bool,
    want_bias: bool,
    elements: int,
    largest: int,
) -> Plan:
    # Neighboring pixels of one channel that fill a memory sector.
    least = min(_SECTOR // element_size, next_power_of_2(per_sample)) if pixels_are_neighbors else 1
    block = min(next_power_of_2(channels), largest)
    # Registers hold twice the elements of one or two tensors, or once those of the three of a second backward.
    if block * least > (elements if second else 2 * elements):
        block = elements // least
    tile = min(max(elements // block, least), next_power_of_2(per_sample), 256)
    groups = samples * ceil_div(per_sample, tile)
    step_p, step_c = (1, per_sample) if pixels_are_neighbors else (channels, 1)
    constants: dict[str, Any] = {
        "per_sample": per_sample, "step_p": step_p, "step_c": step_c, "enable_fp_fusion": True,
        "C": channels, "BLOCK": block, "PIXELS": tile, "num_warps": 16 if block * tile > elements else 8,
        "INT64": samples * per_sample * channels + 2 * elements >= 2**31,
    }  # fmt: skip
    if not backward:
        return Plan((groups,), constants)
    repeat = 4 if want_bias and channels <= block and groups >= 8192 else 1
    groups = samples * ceil_div(per_sample, tile * repeat)
    shape = (groups, channels) if want_bias else (0,)
    return Plan((groups,), {**constants, "SUM": want_bias, "REPEAT": repeat}, shape)


def _launch(kernel: Any, like: Tensor, want_bias: bool = False, **arguments: Any) -> Any:
    """Launch over all pixels.

    Returns:
        Of a backward the sum over all dimensions but C, float32 [C], or [0] if it is not wanted.
    """
    n, channels = like.shape[:2]
    pixels = like.numel() // (n * channels)
    neighbors = not (channels_last(like) or pixels == 1)  # of one channel, in memory
    samples, per_sample = (n, pixels) if neighbors else (1, n * pixels)
    backward, second = "dx" in arguments, arguments.get("u") is not None
    plan = _plan(
        samples, per_sample, channels, neighbors, like.element_size(), backward, second, want_bias, TILE, LARGEST
    )
    partial = None
    if backward:
        arguments["partial"] = partial = torch.empty(plan.partial, dtype=torch.float32, device=like.device)
    plan.launch(kernel, like.device, **arguments)
    return partial.sum(0) if partial is not None and want_bias else partial


def bias_act_pixel_norm_forward(
    x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Forward.

    Args:
        x: [N, C, ...], contiguous or channels_last.
        bias: [C], float32 or the dtype of x.
        act: index into `fastgan.ops.bias_act.ACTS`, of a piecewise linear act.
        negative_slope: slope of lrelu below 0.
        gain: factor of the activation.
        eps: added to the mean square.

    Returns:
        y, like x, and r, float32 [N, 1, ...].
    """
    y = torch.empty_like(x)
    r = torch.empty((x.shape[0], 1, *x.shape[2:]), dtype=torch.float32, device=x.device)
    _launch(_forward_kernel, x, x=x, bias=bias, y=y, r=r, slope=negative_slope, gain=gain, eps=eps, ACT=act)
    return y, r


def bias_act_pixel_norm_backward(
    dy: Tensor, y: Tensor, r: Tensor, act: int, negative_slope: float, gain: float, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """First backward, from the gradient dy of y.

    Returns:
        dx, like y, and the gradient of the bias, float32 [C], or [0] if not wanted.
    """
    dx = torch.empty_like(y)
    settings = {"slope": negative_slope, "gain": gain, "ACT": act}
    return dx, _launch(_backward_kernel, y, want_bias, u=None, dy=dy, y=y, r=r, dx=dx, gx=None, **settings)


def bias_act_pixel_norm_second_backward(
    u: Tensor, dy: Tensor, y: Tensor, r: Tensor, act: int, negative_slope: float, gain: float, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Second backward, from the cotangent u of dx.

    Returns:
        gdy and gx, like y, and the gradient of the bias, float32 [C], or [0] if not wanted.
    """
    gdy, gx = torch.empty_like(y), torch.empty_like(y)
    settings = {"slope": negative_slope, "gain": gain, "ACT": act}
    return gdy, gx, _launch(_backward_kernel, y, want_bias, u=u, dy=dy, y=y, r=r, dx=gdy, gx=gx, **settings)
