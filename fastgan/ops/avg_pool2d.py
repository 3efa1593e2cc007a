"""Average pooling, linear for autograd in every order, and nearest-neighbor upsampling, its adjoint up to a factor."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import SMALL_NUMEL, dense, require_floating
from fastgan.ops.autograd import tracked
from fastgan.ops.backend import LEAN, NATIVE, Op, size_class
from fastgan.ops.kernel_registry import kernel_implementations
from fastgan.ops.torch_private import in_forward_mode, upsample_bilinear2d


def _native_unsupported_reason(*inputs: Tensor, kernel_size: int = 2) -> str | None:
    even = kernel_size == 2 and all(x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 for x in inputs)
    return None if even else "it supports squares of 2x2 and even sizes"


def _native_not_preferred(*inputs: Tensor, **_: int) -> str | None:
    small = inputs and inputs[0].is_cpu and inputs[0].numel() <= SMALL_NUMEL and not in_forward_mode()
    return None if small else f"the default on a CPU up to {SMALL_NUMEL} elements, in reverse mode"


def _cpp_not_preferred(*inputs: Tensor, **options: int) -> str | None:
    native = inputs and (_native_unsupported_reason(*inputs, **options) or _native_not_preferred(*inputs)) is None
    return f"PyTorch's own ops are faster up to {SMALL_NUMEL} elements" if native else None


def _classify(x: Tensor, kernel_size: int = 2) -> tuple[object, ...]:
    return x.device, x.dtype, x.is_contiguous(), size_class(x.numel()), (kernel_size,)


AVG_POOL2D = Op(
    "avg_pool2d",
    {
        "cpp": replace(kernel_implementations("avg_pool2d")["cpp"], not_preferred_reason=_cpp_not_preferred),
        "native": replace(
            NATIVE, unsupported_reason=_native_unsupported_reason, not_preferred_reason=_native_not_preferred
        ),
        "lean": LEAN,
    },
    supports_forward_mode=True,
    classify=_classify,
    variant=("kernel",),
)
Op("interpolate_nearest")


def avg_pool2d(x: Tensor, kernel_size: int = 2, *, backend: str | None = None) -> Tensor:
    """Mean over non-overlapping squares, as `torch.nn.functional.avg_pool2d`.

    That function's double backward sends zeros back through every layer before it; this one's sends nothing.

    Args:
        x: [N, C, H, W], any floating-point dtype.
        kernel_size: k, the side of the squares.
        backend: "cpp", "native" (2x2 alone), "lean" (PyTorch's kernels) or "torch" (PyTorch's own function).

    Returns:
        [N, C, H // k, W // k].

    Raises:
        TypeError: the dtype of `x` is not floating-point.
        ValueError: `x` is not 4-dimensional or smaller than a square, or `kernel_size` is not an integer of at least 1.
    """
    if not isinstance(kernel_size, int) or kernel_size < 1:
        raise ValueError(f"kernel_size must be an integer of at least 1, got {kernel_size}")
    require_floating("x", x)
    if x.ndim != 4 or min(x.shape[2:]) < kernel_size:
        raise ValueError(f"x must be [N, C, H, W], H and W at least {kernel_size}, got shape {tuple(x.shape)}")
    if kernel_size == 2 and AVG_POOL2D.allows_fast_path(backend, x) and is_small_and_even(x):
        return halve(x)
    name = AVG_POOL2D.choose(backend, x, kernel_size=kernel_size)
    if name == "native":
        return halve(x)
    if name == "torch" or (name == "lean" and torch.compiler.is_compiling()):
        return F.avg_pool2d(x, kernel_size)
    return _AvgPool.apply(x, kernel_size, name) if tracked(x) else _pool(x, kernel_size, name)


def interpolate_nearest(x: Tensor, scale_factor: int = 2) -> Tensor:
    """Repeat each pixel `scale_factor` times in both directions: [N, C, H, W] -> [N, C, sH, sW].

    PyTorch's own derivatives of it send nothing back in second order.
    """
    return F.interpolate(x, scale_factor=scale_factor, mode="nearest")


def is_small_and_even(x: Tensor) -> bool:
    """Whether `halve` can average x and is faster than an autograd Function, whose creation would take longer."""
    return x.is_cpu and x.numel() <= SMALL_NUMEL and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0


def halve(x: Tensor) -> Tensor:
    """2x2 mean, up to rounding: bilinear interpolation at half the size, which samples between four pixels.

    Its derivative is linear for autograd, where that of `F.avg_pool2d` sends zeros back through every layer before it.
    """
    return upsample_bilinear2d(x, None, False, (0.5, 0.5))


def _pool(x: Tensor, k: int, name: str) -> Tensor:
    return torch.ops.fastgan.avg_pool2d_forward(dense(x), k) if name == "cpp" else F.avg_pool2d(x, k)


def _spread(gy: Tensor, k: int, size: tuple[int, int], name: str) -> Tensor:
    """Adjoint of `_pool`: each value over its square, divided by k^2."""
    if name == "cpp":
        return torch.ops.fastgan.avg_pool2d_backward(dense(gy), k, *size)
    gx = F.interpolate(gy * (1.0 / k**2), scale_factor=k, mode="nearest")
    if gx.shape[-2:] == size:
        return gx
    # Rows and columns beyond the last whole square have gradient 0.
    return F.pad(gx, (0, size[1] - gx.shape[-1], 0, size[0] - gx.shape[-2]))


class _AvgPool(Function):
    """Linear: its backward is `_AvgPoolAdjoint`, whose backward is this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.k, ctx.size, ctx.name = k, x.shape[-2:], name
        return _pool(x, k, name)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: None) -> Tensor:
        return _AvgPool.apply(tx, ctx.k, ctx.name)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Any, ...]:
        if gy is None:
            return None, None, None
        if in_forward_mode():  # gy may have a tangent, which only PyTorch's own ops propagate
            return _spread(gy, ctx.k, ctx.size, "lean"), None, None
        adjoint = _AvgPoolAdjoint.apply if torch.is_grad_enabled() else _spread
        return adjoint(gy, ctx.k, ctx.size, ctx.name), None, None


class _AvgPoolAdjoint(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, k: int, size: tuple[int, int], name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.k, ctx.name = k, name
        return _spread(gy, k, size, name)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None) -> tuple[Any, ...]:
        if ggx is None:
            return None, None, None, None
        if in_forward_mode():
            return _pool(ggx, ctx.k, "lean"), None, None, None
        pool = _AvgPool.apply if torch.is_grad_enabled() else _pool
        return pool(ggx, ctx.k, ctx.name), None, None, None


# The shapes and strides that the compiled functions return.
PYTORCH_KERNELS = SimpleNamespace(
    avg_pool2d_forward=lambda x, k: _pool(x, k, "lean"),
    avg_pool2d_backward=lambda gy, k, height, width: _spread(gy, k, (height, width), "lean"),
)
