"""Average pooling, linear for autograd in every order, and nearest-neighbor upsampling, its adjoint up to a factor."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops import piecewise
from fastgan.ops.arguments import SMALL_NUMEL, dense
from fastgan.ops.autograd import form_tag, tracked
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import LEAN, NATIVE, Op, size_class
from fastgan.ops.dispatch.kernel_registry import kernel_implementations
from fastgan.ops.dispatch.torch_private import in_forward_mode, upsample_bilinear2d
from fastgan.ops.fallthrough import fall_through, foreign, traced
from fastgan.ops.piecewise import Rule
from fastgan.ops.pooling import adaptive_avg_pool2d, empty_like_input, layout_of


def _unsupported_windows(kernel_size: int | None = 2, **options: object) -> str | None:
    return "it supports squares that do not overlap, without padding" if kernel_size is None else None


def _native_unsupported_reason(*inputs: Tensor, kernel_size: int | None = 2) -> str | None:
    even = kernel_size == 2 and all(x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 for x in inputs)
    return None if even else "it supports squares of 2x2 and even sizes"


def _native_not_preferred(*inputs: Tensor, **_: int | None) -> str | None:
    small = inputs and inputs[0].is_cpu and inputs[0].numel() <= SMALL_NUMEL and not in_forward_mode()
    return None if small else f"the default on a CPU up to {SMALL_NUMEL} elements, in reverse mode"


def _cpp_not_preferred(*inputs: Tensor, **options: int | None) -> str | None:
    native = inputs and (_native_unsupported_reason(*inputs, **options) or _native_not_preferred(*inputs)) is None
    return f"PyTorch's own ops are faster up to {SMALL_NUMEL} elements" if native else None


def _classify(x: Tensor, kernel_size: int | None = 2) -> tuple[object, ...] | None:
    """The class of a call; other windows than squares have one implementation besides plain PyTorch."""
    if kernel_size is None:
        return None
    return x.device, x.dtype, x.is_contiguous(), size_class(x.numel()), (kernel_size,)


_CPP = kernel_implementations("avg_pool2d", _unsupported_windows)["cpp"]
AVG_POOL2D = Op(
    "avg_pool2d",
    {
        "cpp": replace(_CPP, not_preferred_reason=_cpp_not_preferred),
        "native": replace(
            NATIVE, unsupported_reason=_native_unsupported_reason, not_preferred_reason=_native_not_preferred
        ),
        "lean": LEAN,
    },
    supports_forward_mode=True,
    classify=_classify,
    variant=("kernel",),
)
INTERPOLATE = Op("interpolate", {"lean": LEAN})
Op("interpolate_nearest")


def avg_pool2d(
    input: Tensor,
    kernel_size: Any = 2,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d`, whose second derivative, which is zero, sends nothing backward.

    Args:
        input: [N, C, H, W] or [C, H, W]; what is not a plain tensor of a floating-point dtype runs in torch's own
            function.
        kernel_size: as in torch, but 2 when not given; the other arguments are as in torch.
        backend: "cpp" (of squares that do not overlap), "native" (of such squares of 2x2, and even sizes), "lean"
            (PyTorch's kernels) or "torch" (PyTorch's own function).

    Returns:
        [N, C, H', W'], with the default stride [N, C, H // k, W // k]; or without N.
    """
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if foreign(input):
        return fall_through(AVG_POOL2D, avg_pool2d, F.avg_pool2d, (input,), *options, backend=backend)
    k = _side_of_squares(input, options)
    if k == 2 and AVG_POOL2D.allows_fast_path(backend, input) and is_small_and_even(input):
        return halve(input)
    name = AVG_POOL2D.choose(backend, input, kernel_size=k)
    if name == "native":
        return halve(input)
    if name == "torch" or (name == "lean" and torch.compiler.is_compiling()):
        return F.avg_pool2d(input, *options)
    if k is not None:
        return _AvgPool.apply(input, k, name) if tracked(input) else _pool(input, k, name)
    if not tracked(input) or in_forward_mode():
        return F.avg_pool2d(input, *options)
    return piecewise.apply(input, _WINDOWS, (options, input.shape, layout_of(input)))


def _side_of_squares(x: Tensor, options: tuple[Any, ...]) -> int | None:
    """k, if these arguments mean the mean over adjacent k x k squares; else None."""
    kernel_size, stride, padding, ceil_mode, _, divisor_override = options
    k = kernel_size if type(kernel_size) is int else None
    if k is None and isinstance(kernel_size, (tuple, list)) and len(set(kernel_size)) == 1:
        k = kernel_size[0] if type(kernel_size[0]) is int else None
    if k is None or k < 1 or x.ndim != 4 or min(x.shape[2:]) < k or ceil_mode or divisor_override is not None:
        return None
    adjacent = stride is None or stride == k or stride in ((k,), (k, k), [k], [k, k])
    return k if adjacent and type(stride) is not bool and padding in (0, (0,), (0, 0), [0], [0, 0]) else None


def _windows_tangent(t: Tensor, options: Any) -> Tensor:
    return F.avg_pool2d(t, *options[0])


def _windows_cotangent(g: Tensor, options: Any) -> Tensor:
    (kernel, stride, padding, *rest), shape, layout = options
    sizes = ([v] if isinstance(v, int) else list(v) for v in (kernel, kernel if stride is None else stride, padding))
    return torch.ops.aten.avg_pool2d_backward(g, empty_like_input(g, shape, layout), *sizes, *rest)


_WINDOWS = Rule(lambda x, options: (_windows_tangent(x, options), ()), _windows_tangent, _windows_cotangent)


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.interpolate`, whose second derivative sends nothing backward, in mode "area" neither.

    Arguments as in torch, and `backend` as in `avg_pool2d`. In the other modes PyTorch's own derivatives send nothing.
    """
    options = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if foreign(input):
        return fall_through(INTERPOLATE, interpolate, F.interpolate, (input,), *options, backend=backend)
    area = mode == "area" and input.ndim == 4 and INTERPOLATE.choose(backend, input) == "lean"
    if not area or not tracked(input):
        return F.interpolate(input, *options)
    result = F.interpolate(torch.empty(input.shape, dtype=input.dtype, device="meta"), *options)
    return adaptive_avg_pool2d(input, tuple(result.shape[2:]))


def interpolate_nearest(x: Tensor, scale_factor: int = 2) -> Tensor:
    """Repeat each pixel `scale_factor` times in both directions: [N, C, H, W] -> [N, C, sH, sW].

    PyTorch's own derivatives of it send nothing back in second order.
    """
    if not isinstance(x, Tensor):
        return traced(interpolate_nearest, x, scale_factor)
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
        ctx.save_for_backward(form_tag())
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
