"""Random numbers of samples, one launch for a draw. `fastgan.utils.counter_rng` defines them, in torch's operations.

Integers, and so `uniform`, have the bits of that definition everywhere. `normal` calls the functions of CUDA's own
library that torch's kernels call, without flushing denormals, as they are compiled; `fastgan.utils.counter_kernels`
compares the results with torch's on the device before it uses them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .launch import Plan, ceil_div

BLOCK = 256  # numbers, or pairs of them, of a program

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1, _MULTIPLIER_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_SPACING = tl.constexpr(2.0**-23)
_TURN = tl.constexpr(2.0 * math.pi)

# One kernel for all draws: no number is a constant of it.
_jit = triton.jit(
    do_not_specialize=["key", "columns", "size", "count", "high"], do_not_specialize_on_alignment=["index", "out"]
)


@triton.jit
def _mix(x):
    """The finalizer of SplitMix64, of uint64."""
    x = (x ^ (x >> 30)) * _MULTIPLIER_1
    x = (x ^ (x >> 27)) * _MULTIPLIER_2
    return x ^ (x >> 31)


@triton.jit
def _bits(index, key, columns, count, BLOCK: tl.constexpr):
    """Row, column, mask and 64 random bits of this program's places of [N, columns]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // columns
    column = at - row * columns
    sample = tl.load(index + row, mask=inside, other=0).to(tl.uint64)
    state = _mix(sample * _GAMMA + key.to(tl.uint64))
    return row, column, inside, _mix(state + (column + 1).to(tl.uint64) * _GAMMA)


@triton.jit
def _unit(bits23):
    """23 bits to float32 in the open interval (0, 1); exact."""
    return (bits23.to(tl.float32) + 0.5) * _SPACING


@_jit
def _uniform_kernel(index, out, key, columns, count, BLOCK: tl.constexpr):
    row, column, inside, bits = _bits(index, key, columns, count, BLOCK)
    tl.store(out + row * columns + column, _unit(bits >> 41), mask=inside)


@_jit
def _normal_kernel(index, out, key, columns, size, count, BLOCK: tl.constexpr):
    """Box-Muller: a cosine into the first half of a row, the sine of the same angle into the second."""
    row, column, inside, bits = _bits(index, key, columns, count, BLOCK)
    radius = libdevice.sqrt_rn(libdevice.log(_unit(bits >> 41)) * -2.0)
    angle = _unit((bits & 0xFFFFFF) >> 1) * _TURN
    at = out + row * size + column
    tl.store(at, radius * libdevice.cos(angle), mask=inside)
    tl.store(at + columns, radius * libdevice.sin(angle), mask=inside & (column + columns < size))


@_jit
def _integers_kernel(index, out, key, columns, high, count, BLOCK: tl.constexpr):
    row, _, inside, bits = _bits(index, key, columns, count, BLOCK)
    tl.store(out + row, ((bits >> 32).to(tl.int64) * high) >> 32, mask=inside)


@functools.lru_cache(maxsize=4096)
def _plan(key: int, count: int, numbers: tuple[tuple[str, int], ...], block: int) -> Plan:
    options = {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": True, "enable_reflect_ftz": False}
    return Plan((ceil_div(count, block),), {"key": key, "count": count, **dict(numbers), **options})


def _launch(kernel: Any, index: Tensor, out: Tensor, key: int, columns: int, **more: int) -> Tensor:
    count = index.numel() * columns
    if count:
        plan = _plan(key, count, (("columns", columns), *more.items()), BLOCK)
        plan.launch(kernel, index.device, index=index.to(torch.int64).contiguous(), out=out)
    return out


def uniform(key: int, index: Tensor, size: int) -> Tensor:
    """Uniform on (0, 1), float32 [N, size].

    Args:
        key: of seed and stream, an int64.
        index: sample indices, integers [N].
        size: numbers for each sample.
    """
    out = torch.empty((len(index), size), dtype=torch.float32, device=index.device)
    return _launch(_uniform_kernel, index, out, key, size)


def normal(key: int, index: Tensor, size: int) -> Tensor:
    """Standard normal, float32 [N, size]; arguments as in `uniform`."""
    out = torch.empty((len(index), size), dtype=torch.float32, device=index.device)
    return _launch(_normal_kernel, index, out, key, (size + 1) // 2, size=size)


def integers(key: int, index: Tensor, high: int) -> Tensor:
    """Uniform in [0, high), int64 [N]; arguments as in `uniform`."""
    out = torch.empty(len(index), dtype=torch.int64, device=index.device)
    return _launch(_integers_kernel, index, out, key, 1, high=high)
