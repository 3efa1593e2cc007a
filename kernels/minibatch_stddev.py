"""Minibatch standard deviation and its derivatives; `fastgan.ops.minibatch_stddev` says in full what is computed.

A program takes the same places of all samples of one group, so that the statistics over the group need no second read,
and copies what is copied in the same pass. Sums over places are sums of the programs' sums, in a fixed order; they are
spread over the maps by a second, small kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels.launch import channels_last, on

TILE = 4096  # elements


@triton.jit
def _places(
    tiles, groups, n, pixels, C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(group, chunk, offsets into [N, C, ...] and [N, C + F, ...], mask) of this program's [samples, places]."""
    program = tl.program_id(0) // tiles
    group = program // F
    chunk = program % F
    places = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, PADDED)
    sample = member * groups + group
    if WIDE:
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
    """x less its mean over the group, and the standard deviation [places]."""
    d = tl.where(mask, x - (tl.sum(x, 0) / GROUP)[None, :], 0.0)
    return d, tl.sqrt(tl.sum(d * d, 0) / GROUP + eps)


@triton.jit
def _forward_kernel(
    x, y, partial, tiles, groups, n, pixels, eps,
    C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, _, narrow, broad, mask, inside = _places(tiles, groups, n, pixels, C, F, GROUP, PADDED, BLOCK, LAST, WIDE)
    value = tl.load(x + narrow, mask=mask, other=0.0)
    tl.store(y + broad, value, mask=mask)
    _, sigma = _deviation(value.to(tl.float32), mask, eps, GROUP)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, sigma, 0.0), 0))


@triton.jit
def _maps_kernel(
    partial, y, tiles, groups, pixels, scale, C: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Fill one sample's map with the sum of its group's and chunk's partial sums, times scale."""
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


@triton.jit
def _backward_kernel(
    dy, x, t, dx, tiles, groups, n, pixels, eps,
    C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    group, chunk, narrow, broad, mask, _ = _places(tiles, groups, n, pixels, C, F, GROUP, PADDED, BLOCK, LAST, WIDE)
    d, sigma = _deviation(tl.load(x + narrow, mask=mask, other=0.0).to(tl.float32), mask, eps, GROUP)
    grad = tl.load(dy + broad, mask=mask, other=0.0).to(tl.float32)
    found = grad + d * (tl.load(t + group * F + chunk) / (GROUP * sigma))[None, :]
    tl.store(dx + narrow, found.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _second_kernel(
    u, x, t, gdy, gx, partial, tiles, groups, n, pixels, eps,
    C: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    group, chunk, narrow, broad, mask, inside = _places(
        tiles, groups, n, pixels, C, F, GROUP, PADDED, BLOCK, LAST, WIDE
    )
    given = tl.load(u + narrow, mask=mask, other=0.0)
    tl.store(gdy + broad, given, mask=mask)
    v = given.to(tl.float32)
    v -= (tl.sum(v, 0) / GROUP)[None, :]  # before the product: the rounding error of d is the same in all of a group
    d, sigma = _deviation(tl.load(x + narrow, mask=mask, other=0.0).to(tl.float32), mask, eps, GROUP)
    along = tl.sum(v * d, 0) / GROUP
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, along / sigma, 0.0), 0))
    scale = tl.load(t + group * F + chunk) / (GROUP * sigma)
    found = (v - d * (along / (sigma * sigma))[None, :]) * scale[None, :]
    tl.store(gx + narrow, found.to(gx.dtype.element_ty), mask=mask)


class _Shape:
    """How x [N, C, H, W] is cut into programs."""

    def __init__(self, x: Tensor, group: int, num_features: int) -> None:
        self.n, self.channels, self.height, self.width = x.shape
        self.features, self.groups = num_features, self.n // group
        self.pixels = self.height * self.width
        self.places = self.pixels * (self.channels // num_features)
        padded = triton.next_power_of_2(group)
        tile = TILE if padded < 16 else TILE // 2  # a large group's float32 spills on sm_80 otherwise
        block = min(max(16, tile // padded), triton.next_power_of_2(self.places))
        self.tiles = triton.cdiv(self.places, block)
        self.last = channels_last(x)
        self.programs = self.groups * num_features * self.tiles
        self.constants: dict[str, Any] = {
            "C": self.channels, "F": num_features, "GROUP": group, "PADDED": padded, "BLOCK": block, "LAST": self.last,
            "WIDE": x.numel() // self.channels * (self.channels + num_features) + padded * block >= 2**31,
        }  # fmt: skip

    def run(self, kernel: Any, x: Tensor, eps: float, **tensors: Tensor) -> None:
        with on(x.device):
            kernel[(self.programs,)](
                x=x, **tensors, tiles=self.tiles, groups=self.groups, n=self.n, pixels=self.pixels, eps=eps,
                **self.constants, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A new [N, C + F, H, W] in x's memory format, and partial sums."""
        form = torch.channels_last if self.last else torch.contiguous_format
        shape = (self.n, self.channels + self.features, self.height, self.width)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
        return y, torch.empty(self.programs, dtype=torch.float32, device=x.device)

    def fill_maps(self, y: Tensor, partial: Tensor) -> None:
        with on(y.device):
            _maps_kernel[(self.n * self.features,)](
                partial=partial, y=y, tiles=self.tiles, groups=self.groups, pixels=self.pixels, scale=1 / self.places,
                C=self.channels, F=self.features, BLOCK=1024, LAST=self.last, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def minibatch_stddev_forward(x: Tensor, group: int, num_features: int, eps: float) -> Tensor:
    shape = _Shape(x, group, num_features)
    y, partial = shape.with_maps(x)
    shape.run(_forward_kernel, x, eps, y=y, partial=partial)
    shape.fill_maps(y, partial)
    return y


def minibatch_stddev_backward(
    dy: Tensor, x: Tensor, group: int, num_features: int, eps: float
) -> tuple[Tensor, Tensor]:
    shape = _Shape(x, group, num_features)
    dx = torch.empty_like(x)
    maps = dy[:, shape.channels :].unflatten(0, (group, shape.groups))
    t = maps.sum((0, 3, 4), dtype=torch.float32).div_(shape.places)
    shape.run(_backward_kernel, x, eps, dy=dy, t=t, dx=dx)
    return dx, t


def minibatch_stddev_second_backward(
    u: Tensor, x: Tensor, t: Tensor, group: int, num_features: int, eps: float
) -> tuple[Tensor, Tensor]:
    shape = _Shape(x, group, num_features)
    gdy, partial = shape.with_maps(x)
    gx = torch.empty_like(x)
    shape.run(_second_kernel, x, eps, u=u, t=t, gdy=gdy, gx=gx, partial=partial)
    shape.fill_maps(gdy, partial)
    return gdy, gx
