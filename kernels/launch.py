"""What every launcher shares: device, numeric precision, offsets."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; inside this one, that is the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def float32_precision() -> str:
    """How `tl.dot` multiplies float32: exactly, unless torch's own setting for matrix products allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def wide(*tensors: Tensor | None, dims: int) -> bool:
    """Whether an offset inside the last `dims` dimensions of any tensor can pass 2^31 - 1 elements."""
    for x in tensors:
        if x is not None:
            # Tiles reach past the edge by less than one tile, and those addresses are formed though not read.
            reach = sum(
                (size + 256) * abs(step) for size, step in zip(x.shape[-dims:], x.stride()[-dims:], strict=True)
            )
            if reach >= 2**31:
                return True
    return False


def channels_last(x: Tensor) -> bool:
    """Whether dense x [N, C, ...] has its channels next to each other in memory and not its pixels."""
    return not x.is_contiguous()
