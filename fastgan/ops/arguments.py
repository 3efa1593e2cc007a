"""Arguments of the ops: their checks, the dtype of sums over them, and the memory formats that kernels expect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements up to which PyTorch's own ops are faster than an autograd Function, which Python has to create.
SMALL_NUMEL = 2**17


def require_number(name: str, value: Any) -> float:
    """`value`, unless it is not a real number. A tensor is not one: kernels would give it no gradient."""
    if value.__class__ is float or value.__class__ is int:
        return value
    if isinstance(value, (Tensor, str, bytes, complex)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {'a tensor' if isinstance(value, Tensor) else repr(value)}")
    return value


def require_eps(eps: float) -> None:
    if not require_number("eps", eps) >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def require_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")


def require_feature_map(x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a floating-point tensor [N, C, ...]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    require_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...], got {x.ndim} dimensions")


def is_plain_tensor(x: Any) -> bool:
    """Whether x is a torch.Tensor or Parameter itself and not of a subclass such as FakeTensor."""
    return x.__class__ is Tensor or x.__class__ is torch.nn.Parameter


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """dtype of sums over x: float32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _memory_format(x: Tensor) -> torch.memory_format:
    """contiguous or channels_last, whichever x is in or, where it is in neither, is closer to."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and (x.is_contiguous(memory_format=last) or x.stride(1) == 1):
        return last
    return torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether x is in channels_last and not contiguous as well, or has one channel and the strides of channels_last."""
    if x.is_contiguous():  # with one channel that does not tell; torch looks at the strides, too
        return x.ndim == 4 and x.shape[1] == 1 == x.stride(1) and x.shape[2] * x.shape[3] > 1
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it that is contiguous or channels_last."""
    return x.contiguous(memory_format=_memory_format(x))


def dense_like(x: Tensor, other: Tensor) -> Tensor:
    """x, or a copy of it, in the memory format of `other`, which is dense and has x's shape."""
    return x.contiguous(memory_format=_memory_format(other))
