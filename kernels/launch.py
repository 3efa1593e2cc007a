"""Shared by the launchers: device, precision of float32 products, offset width, memory format."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current, as Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def float32_precision() -> str:
    """`input_precision` of `tl.dot`: "ieee", or "tf32" if torch's setting for matrix products allows it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def needs_int64_offsets(*tensors: Tensor | None, dims: int) -> bool:
    """Whether an offset within the last `dims` dimensions of any tensor can exceed 2^31 - 1 elements."""
    for x in tensors:
        if x is not None:
            # Tiles extend past the edge by less than a tile; those addresses are computed, though not read.
            reach = sum(
                (size + 256) * abs(step) for size, step in zip(x.shape[-dims:], x.stride()[-dims:], strict=True)
            )
            if reach >= 2**31:
                return True
    return False


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are contiguous in dense x [N, C, ...]."""
    return not x.is_contiguous()
