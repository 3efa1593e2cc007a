"""Resampling with a FIR filter, as the discriminators of StyleGAN have it (Karras et al. 2019, "A style-based
generator architecture", section 2; Zhang 2019, "Making convolutional networks shift-invariant again").

It is a chain of linear maps: insert zeros, pad, convolve with the filter, keep every k-th pixel. The channels join the
batch, so that the convolution has one channel and no groups, and its lean derivatives serve for any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.arguments import require_floating, require_number
from fastgan.ops.conv import conv2d
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import Op
from fastgan.ops.fallthrough import traced
from fastgan.ops.padding import pad

Op("upfirdn2d")
Op("blur")

Filter = Tensor | Sequence[float]


def _require(x: Tensor, filter: Filter, up: int, down: int) -> Tensor:
    """The filter as a tensor [k] or [kH, kW] like x."""
    require_floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.ndim} dimensions")
    f = torch.as_tensor(filter, dtype=x.dtype, device=x.device)
    if f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f"filter must be [k] or [kH, kW], got shape {tuple(f.shape)}")
    for name, value in (("up", up), ("down", down)):
        if type(value) is not int:
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return f


def _sides(padding: Any) -> tuple[int, int, int, int]:
    """left, right, top, bottom."""
    values = (padding,) if isinstance(padding, int) else tuple(padding)
    if len(values) not in (1, 2, 4) or not all(type(v) is int for v in values):
        raise ValueError(f"padding must be an integer, (x, y) or (left, right, top, bottom), got {padding!r}")
    if len(values) == 4:
        return values
    x, y = values * 2 if len(values) == 1 else values
    return x, x, y, y


def _fir(x: Tensor, f: Tensor, down: int, flip: bool) -> Tensor:
    """x: [N, 1, H, W] correlated with a filter [kH, kW] (flipped first unless `flip`), every `down`-th pixel of it."""
    f = f if flip else f.flip(0, 1)
    return conv2d(x, f[None, None], stride=down)


def upfirdn2d(
    x: Tensor,
    filter: Filter,
    up: int = 1,
    down: int = 1,
    padding: Any = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Insert zeros, pad with zeros, convolve with a filter, keep every `down`-th pixel, multiply by `gain`.

    Linear, differentiable to any order in `x` and, given as a tensor [kH, kW] or [k], in the filter.

    Args:
        x: [N, C, H, W], floating-point.
        filter: [kH, kW]; or [k], which is applied in both directions. Numbers or a tensor.
        up: a pixel becomes up x up, the pixel itself and zeros behind it.
        down: every down-th pixel of every down-th row is kept.
        padding: zeros around the image after `up`: one number, (x, y) or (left, right, top, bottom); negative ones cut.
        flip_filter: correlate with the filter, where a convolution would mirror it.
        gain: factor of the result; up^2 keeps the brightness when upsampling with a filter of sum 1.

    Returns:
        [N, C, H', W'] with H' = (H up + top + bottom - kH) // down + 1, W' alike.

    Raises:
        TypeError: `x` is not floating-point, or an argument has the wrong type.
        ValueError: `x` is not 4-dimensional, the filter is not one, or `up` or `down` is below 1.
    """
    if not isinstance(x, Tensor):
        return traced(upfirdn2d, x, filter, up, down, padding, flip_filter, gain)
    f = _require(x, filter, up, down)
    left, right, top, bottom = _sides(padding)
    gain = require_number("gain", gain)
    n, c, h, w = x.shape
    y = x.reshape(n * c, 1, h, w)
    if up > 1:
        y = F.pad(y.reshape(n * c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(n * c, 1, h * up, w * up)
    if left or right or top or bottom:
        y = F.pad(y, (left, right, top, bottom))
    if f.ndim == 1:
        y = conv2d(y, (f if flip_filter else f.flip(0))[None, None, None, :], stride=(1, down))
        y = conv2d(y, (f if flip_filter else f.flip(0))[None, None, :, None], stride=(down, 1))
    else:
        y = _fir(y, f, down, flip_filter)
    y = y if gain == 1 else y * gain
    return y.reshape(n, c, *y.shape[2:])


def blur(x: Tensor, filter: Filter = (1.0, 2.0, 1.0), padding_mode: str = "reflect", down: int = 1) -> Tensor:
    """Low-pass filter of odd length that keeps the size, then every `down`-th pixel.

    Args:
        x: [N, C, H, W], floating-point.
        filter: [k] of odd length, applied in both directions; divided by its sum.
        padding_mode: "reflect", "replicate", "circular" or "constant" (zeros): what lies beyond the border.
        down: every down-th pixel of every down-th row is kept.

    Returns:
        [N, C, ceil(H / down), ceil(W / down)].

    Raises:
        TypeError, ValueError: as in `upfirdn2d`; or the filter has an even length or sum 0.
    """
    if not isinstance(x, Tensor):
        return traced(blur, x, filter, padding_mode, down)
    f = _require(x, filter, 1, down)
    if f.ndim != 1 or f.numel() % 2 == 0:
        raise ValueError(f"filter must be [k] with k odd, got shape {tuple(f.shape)}")
    side = f.numel() // 2
    y = pad(x, (side,) * 4, padding_mode) if side else x
    return upfirdn2d(y, f / f.sum(), down=down)
