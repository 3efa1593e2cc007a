"""`torch.nn.functional` with the lean functions of `fastgan.ops`: `import fastgan.functional as F`.

Every name of `torch.nn.functional` is here. Those in `LEAN` have torch's signatures and results, and send no zeros
backward in second order; the others are torch's own.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch.nn.functional as _torch
from torch import Tensor

from fastgan.ops import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    conv2d,
    conv_transpose2d,
    group_norm,
    hardtanh,
    instance_norm,
    interpolate,
    layer_norm,
    leaky_relu,
    linear,
    max_pool2d,
    pad,
    prelu,
    relu,
    relu6,
    scaled_dot_product_attention,
    threshold,
)


def relu_(input: Tensor) -> Tensor:
    return relu(input, inplace=True)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    return leaky_relu(input, negative_slope, inplace=True)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return hardtanh(input, min_val, max_val, inplace=True)


def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    return _threshold(input, threshold, value, inplace=True)


_threshold = threshold


def upsample(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None
) -> Tensor:
    return interpolate(input, size, scale_factor, mode, align_corners)


_LEAN = {
    function.__name__: function
    for function in (
        adaptive_avg_pool2d,
        adaptive_max_pool2d,
        avg_pool2d,
        conv2d,
        conv_transpose2d,
        group_norm,
        hardtanh,
        hardtanh_,
        instance_norm,
        interpolate,
        layer_norm,
        leaky_relu,
        leaky_relu_,
        linear,
        max_pool2d,
        pad,
        prelu,
        relu,
        relu6,
        relu_,
        scaled_dot_product_attention,
        threshold,
        threshold_,
        upsample,
    )
}


def _attention_over_lean_functions() -> Any:
    """torch's function, which is in Python, with the lean functions in place of those that it calls."""
    plain = _torch.multi_head_attention_forward
    names = {**plain.__globals__, **_LEAN}
    return FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)


multi_head_attention_forward = _attention_over_lean_functions()

LEAN = (*_LEAN, "multi_head_attention_forward")
__all__ = [name for name in dir(_torch) if not name.startswith("_")]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'fastgan.functional' has no attribute {name!r}")
    try:
        return getattr(_torch, name)
    except AttributeError:
        raise AttributeError(f"module 'fastgan.functional' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})
