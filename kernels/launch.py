"""Shared by the launchers: device, precision of float32 products, offset width, memory format."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` is the same by way of objects of Triton's language, which take much longer."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1; see `ceil_div`."""
    return 1 << (n - 1).bit_length()


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current, as Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def float32_precision(products: Literal["matmul", "conv"]) -> str:
    """`input_precision` of `tl.dot`: "ieee", or "tf32" if torch allows it in these products of float32 on a GPU.

    The one place that reads torch's settings, so that a kernel of ours computes as cuBLAS and cuDNN do beside it. They
    form a tree: what is "none" for an operation is that of its backend, and what is "none" there that of all backends.
    """
    backends: Any = torch.backends
    operation = backends.cuda.matmul if products == "matmul" else backends.cudnn.conv
    for setting in (operation, backends.cudnn, backends):
        if setting.fp32_precision != "none":
            return "tf32" if setting.fp32_precision == "tf32" else "ieee"
    return "ieee"


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
