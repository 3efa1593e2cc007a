"""Minibatch standard deviation with its first and second derivatives.

Appends F maps to x [N, C, H, W]: the standard deviation over each group of samples, averaged over the pixels and over a
chunk of C / F channels (Karras et al., "Progressive Growing of GANs", 2017, arXiv:1710.10196).
`fastgan.ops.minibatch_stddev` has the equations and documents the arguments. x is dense; float32, float16 or bfloat16;
statistics and sums are float32.

A position is a pixel and a channel of one chunk. A program takes the same positions of all samples of one group, so
that statistics over the group need no second read, and copies x in the same pass. Sums over positions are sums of the
programs' sums in a fixed order. A second, small kernel writes them to the maps. Results are bit-identical between runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, ceil_div, channels_last, next_power_of_2

TILE = 4096  # elements

# One kernel for all batches: registers and vector loads are the same.
_jit = triton.jit(do_not_specialize=["tiles", "groups", "n"])


@triton.jit
def _positions(
    tiles, groups, n, pixels, C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Group, chunk, offsets in [N, C, ...] and in [N, C + F, ...], masks of this program's [samples, positions]."""
    program = tl.program_id(0) // tiles
    group = program // F
    chunk = program % F
    places = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, PADDED)
    sample = member * groups + group
    if INT64:
        places = places.to(tl.int64)
        sample = sample.to(tl.int64)
    inside = places < pixels * (C // F)
    if LAST:
        pixel = places // (C // F)
        channel = places % (C // F) + chunk * (C // F)
        narrow = pixel * C + channel
        broad = pixel * (C + F) + channel
    else:
        narrow = chunk * (C // F) * pixels + places
        broad = narrow
    narrow = sample[:, None] * (C * pixels) + narrow[None, :]
    broad = sample[:, None] * ((C + F) * pixels) + broad[None, :]
    return group, chunk, narrow, broad, (member < GROUP)[:, None] & inside[None, :], inside


@triton.jit
def _deviation(x, mask, eps, GROUP: tl.constexpr):
    """x minus its mean over the group, and the standard deviation [positions]."""
    d = tl.where(mask, x - (tl.sum(x, 0) / GROUP)[None, :], 0.0)
    return d, tl.sqrt(tl.sum(d * d, 0) / GROUP + eps)


@_jit
def _forward_kernel(
    x, y, partial, tiles, groups, n, pixels, eps,
    C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    _, _, narrow, broad, mask, inside = _positions(tiles, groups, n, pixels, C, F, GROUP, PADDED, BLOCK, LAST, INT64)
    value = tl.load(x + narrow, mask=mask, other=0.0)
    tl.store(y + broad, value, mask=mask)
    _, sigma = _deviation(value.to(tl.float32), mask, eps, GROUP)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, sigma, 0.0), 0))


@_jit
def _maps_kernel(
    partial, y, tiles, groups, pixels, scale, C: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Fill one map of one sample with `scale` times the sum of the partial sums of its group and chunk."""
    sample = tl.program_id(0) // F
    chunk = tl.program_id(0) % F
    first = ((sample % groups) * F + chunk).to(tl.int64) * tiles
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(partial + first + tile, mask=tile < tiles, other=0.0)
    value = (tl.sum(total, 0) * scale).to(y.dtype.element_ty)
    base = y + sample.to(tl.int64) * ((C + F) * pixels)
    for start in range(0, pixels, BLOCK):
        pixel = (start + tl.arange(0, BLOCK)).to(tl.int64)
        offsets = pixel * (C + F) + C + chunk if LAST else (C + chunk) * pixels + pixel
        tl.store(base + offsets, tl.zeros([BLOCK], y.dtype.element_ty) + value, mask=pixel < pixels)


@_jit
def _backward_kernel(
    dy, x, t, dx, tiles, groups, n, pixels, eps,
    C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    group, chunk, narrow, broad, mask, _ = _positions(tiles, groups, n, pixels, C, F, GROUP, PADDED, BLOCK, LAST, INT64)
    d, sigma = _deviation(tl.load(x + narrow, mask=mask, other=0.0).to(tl.float32), mask, eps, GROUP)
    grad = tl.load(dy + broad, mask=mask, other=0.0).to(tl.float32)
    result = grad + d * (tl.load(t + group * F + chunk) / (GROUP * sigma))[None, :]
    tl.store(dx + narrow, result.to(dx.dtype.element_ty), mask=mask)


@_jit
def _second_kernel(
    u, x, t, gdy, gx, partial, tiles, groups, n, pixels, eps,
    C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    group, chunk, narrow, broad, mask, inside = _positions(
        tiles, groups, n, pixels, C, F, GROUP, PADDED, BLOCK, LAST, INT64
    )
    given = tl.load(u + narrow, mask=mask, other=0.0)
    tl.store(gdy + broad, given, mask=mask)
    v = given.to(tl.float32)
    v -= (tl.sum(v, 0) / GROUP)[None, :]  # before the product, as the rounding error of d is common to the group
    d, sigma = _deviation(tl.load(x + narrow, mask=mask, other=0.0).to(tl.float32), mask, eps, GROUP)
    along = tl.sum(v * d, 0) / GROUP
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, along / sigma, 0.0), 0))
    scale = tl.load(t + group * F + chunk) / (GROUP * sigma)
    result = (v - d * (along / (sigma * sigma))[None, :]) * scale[None, :]
    tl.store(gx + narrow, result.to(gx.dtype.element_ty), mask=mask)


class _Shape:
    """How x [N, C, H, W] is split into programs, and the launches on it."""

    def __init__(self, sizes: torch.Size, last: bool, group: int, num_features: int, elements: int) -> None:
        self.n, self.channels, self.height, self.width = sizes
        self.features, self.groups = num_features, self.n // group
        self.pixels = self.height * self.width
        self.places = self.pixels * (self.channels // num_features)
        padded = next_power_of_2(group)
        tile = elements if padded < 16 else elements // 2  # else large float32 groups spill on sm_80
        block = min(max(16, tile // padded), next_power_of_2(self.places))
        self.tiles = ceil_div(self.places, block)
        self.last = last
        self.programs = self.groups * num_features * self.tiles
        common = {
            "tiles": self.tiles, "groups": self.groups, "pixels": self.pixels, "C": self.channels, "F": num_features,
            "LAST": last, "enable_fp_fusion": True,
        }  # fmt: skip
        self.plan = Plan((self.programs,), {
            **common, "n": self.n, "GROUP": group, "PADDED": padded, "BLOCK": block, "num_warps": 8,
            "INT64": sizes.numel() // self.channels * (self.channels + num_features) + padded * block >= 2**31,
        })  # fmt: skip
        self.plan_of_maps = Plan((self.n * num_features,), {
            **common, "scale": 1 / self.places, "BLOCK": 1024, "num_warps": 4,
        })  # fmt: skip

    @staticmethod
    def of(x: Tensor, group: int, num_features: int) -> _Shape:
        return _shape(x.shape, channels_last(x), group, num_features, TILE)

    def run(self, kernel: Any, x: Tensor, eps: float, **tensors: Tensor) -> None:
        self.plan.launch(kernel, x.device, x=x, eps=eps, **tensors)

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialized [N, C + F, H, W] in the memory format of x, and partial sums."""
        form = torch.channels_last if self.last else torch.contiguous_format
        shape = (self.n, self.channels + self.features, self.height, self.width)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
        return y, torch.empty(self.programs, dtype=torch.float32, device=x.device)

    def fill_maps(self, y: Tensor, partial: Tensor) -> None:
        self.plan_of_maps.launch(_maps_kernel, y.device, partial=partial, y=y)


_shape = functools.lru_cache(maxsize=4096)(_Shape)


def minibatch_stddev_forward(x: Tensor, group: int, num_features: int, eps: float) -> Tensor:
    """Append the maps.

    Args:
        x: [N, C, H, W], contiguous or channels_last.
        group: samples in a group, G; sample n belongs to group n mod (N / G).
        num_features: maps to append, F; a divisor of C.
        eps: added to the variance.

    Returns:
        [N, C + F, H, W] in the dtype and memory format of x.
    """
    shape = _Shape.of(x, group, num_features)
    y, partial = shape.with_maps(x)
    shape.run(_forward_kernel, x, eps, y=y, partial=partial)
    shape.fill_maps(y, partial)
    return y


def minibatch_stddev_backward(
    dy: Tensor, x: Tensor, group: int, num_features: int, eps: float
) -> tuple[Tensor, Tensor]:
    """First backward.

    Args:
        dy: gradient of the result, [N, C + F, H, W].
        x, group, num_features, eps: as in `minibatch_stddev_forward`.

    Returns:
        dx, like x, and t, float32 [N / G, F]: the maps' gradients summed over samples and pixels, divided by the
        positions of a chunk.
    """
    shape = _Shape.of(x, group, num_features)
    dx = torch.empty_like(x)
    maps = dy[:, shape.channels :].unflatten(0, (group, shape.groups))
    t = maps.sum((0, 3, 4), dtype=torch.float32).div_(shape.places)
    shape.run(_backward_kernel, x, eps, dy=dy, t=t, dx=dx)
    return dx, t


def minibatch_stddev_second_backward(
    u: Tensor, x: Tensor, t: Tensor, group: int, num_features: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Second backward, from the cotangent u of dx; t is from `minibatch_stddev_backward`.

    Returns:
        gdy, [N, C + F, H, W], and gx, like x.
    """
    shape = _Shape.of(x, group, num_features)
    gdy, partial = shape.with_maps(x)
    gx = torch.empty_like(x)
    shape.run(_second_kernel, x, eps, u=u, t=t, gdy=gdy, gx=gx, partial=partial)
    shape.fill_maps(gdy, partial)
    return gdy, gx
