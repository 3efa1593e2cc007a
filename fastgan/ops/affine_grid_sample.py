"""Bilinear sampling on an affine grid, linear in the image: its derivatives are the op and its adjoint, to any order.

PyTorch's own `grid_sample` has no second derivative in older releases, and in all of them its backward computes the
gradient of a grid that here has none.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import accumulation_dtype, dense, require_floating
from fastgan.ops.autograd import needs_gradient, non_leaf, tracked
from fastgan.ops.dispatch.backend import Op, by_size
from fastgan.ops.dispatch.kernel_registry import kernel_implementations
from fastgan.ops.fallthrough import traced

_CPP = kernel_implementations("affine_grid_sample")["cpp"]
AFFINE_GRID_SAMPLE = Op("affine_grid_sample", {"cpp": _CPP}, classify=by_size)
PADDING_MODES = ("reflection", "zeros")


def affine_grid_sample(
    x: Tensor, theta: Tensor, padding_mode: str = "reflection", *, backend: str | None = None
) -> Tensor:
    """Images under an affine map of their coordinates, as `F.grid_sample(x, F.affine_grid(theta, x.shape))`.

    Output pixel (i, j) is the bilinear interpolation of `x` at theta (j, i, 1), in coordinates that are -1 and 1 at the
    outer edges of the first and the last pixel (`align_corners=False`). A theta that permutes pixels (flips, turns by
    90 degrees, translations by whole pixels) copies them exactly.

    Args:
        x: [N, C, H, W], any floating-point dtype.
        theta: [N, 2, 3], one map from output to input coordinates for each image; there is no gradient with respect to
            it. Its dtype should be float32 at least.
        padding_mode: outside of the image: "reflection" at the outer edges, or "zeros".
        backend: "cpp" or "torch", plain gathers.

    Returns:
        [N, C, H, W] in x's dtype. Differentiable to any order with respect to `x`.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown padding mode, or a `theta` that requires a gradient.
    """
    if not isinstance(x, Tensor) or not isinstance(theta, Tensor):
        return traced(affine_grid_sample, x, theta, padding_mode, backend=backend)
    require_floating("x", x)
    require_floating("theta", theta)
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.ndim} dimensions")
    if theta.shape != (x.shape[0], 2, 3):
        raise ValueError(f"theta must be [{x.shape[0]}, 2, 3], one map for each image, got {tuple(theta.shape)}")
    if theta.device != x.device:
        raise ValueError(f"theta must be on {x.device}, as x, got {theta.device}")
    if theta.requires_grad:
        raise ValueError("theta must not require a gradient: the op is differentiated with respect to x alone")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be {' or '.join(PADDING_MODES)}, got {padding_mode!r}")
    name, reflect = AFFINE_GRID_SAMPLE.choose(backend, x), padding_mode == "reflection"
    theta = theta.to(accumulation_dtype(x)).contiguous()
    if name == "torch":
        return _sample(x, theta, reflect)
    if tracked(x):
        return _Sample.apply(non_leaf(x), theta, reflect)
    return torch.ops.fastgan.affine_grid_sample_forward(dense(x), theta, reflect)


def _axis(at: Tensor, size: int, reflect: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two pixels around each position along one axis, int64, and their weights."""
    if reflect:
        # Twice the size is a period; in each, the second half is the mirror image of the first.
        at = torch.remainder(at + 0.5, 2.0 * size)
        at = (torch.minimum(at, 2.0 * size - at) - 0.5).clamp(0.0, size - 1.0)
    low = at.floor()
    weight = at - low
    below, above = 1.0 - weight, weight
    if not reflect:
        below = below * ((low >= 0) & (low <= size - 1))
        above = above * ((low >= -1) & (low < size - 1))
        low = low.clamp(-1.0, float(size))  # before the conversion, which far positions would overflow
    first = low.to(torch.int64)
    return first.clamp(0, size - 1), (first + 1).clamp(0, size - 1), below, above


def _corners(theta: Tensor, height: int, width: int, reflect: bool) -> list[tuple[Tensor, Tensor]]:
    """Indices of the four pixels around each position, int64 [N, H W], and their weights [N, H W]."""
    # In pixels from the center, so that maps which permute pixels are exact.
    i = torch.arange(height, device=theta.device, dtype=theta.dtype)[:, None] - 0.5 * (height - 1)
    j = torch.arange(width, device=theta.device, dtype=theta.dtype)[None, :] - 0.5 * (width - 1)
    t = theta[:, :, :, None, None]
    x = t[:, 0, 0] * j + t[:, 0, 1] * (i * (width / height)) + (t[:, 0, 2] * (0.5 * width) + 0.5 * (width - 1))
    y = t[:, 1, 0] * (j * (height / width)) + t[:, 1, 1] * i + (t[:, 1, 2] * (0.5 * height) + 0.5 * (height - 1))
    left, right, wl, wr = _axis(x, width, reflect)
    top, bottom, wt, wb = _axis(y, height, reflect)
    pairs = [
        (row * width + column, a * b) for row, a in ((top, wt), (bottom, wb)) for column, b in ((left, wl), (right, wr))
    ]
    return [(index.flatten(1), weight.flatten(1)) for index, weight in pairs]


def _sample(x: Tensor, theta: Tensor, reflect: bool) -> Tensor:
    """The op in plain PyTorch, differentiable to any order."""
    flat = x.flatten(2).to(theta.dtype)
    y: Any = 0.0
    for index, weight in _corners(theta, x.shape[2], x.shape[3], reflect):
        y = y + flat.gather(2, index[:, None].expand(flat.shape)) * weight[:, None]
    return y.to(x.dtype).view(x.shape).contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _spread(gy: Tensor, theta: Tensor, reflect: bool) -> Tensor:
    """Adjoint of `_sample` in plain PyTorch."""
    flat = gy.flatten(2).to(theta.dtype)
    gx = torch.zeros_like(flat)
    for index, weight in _corners(theta, gy.shape[2], gy.shape[3], reflect):
        gx = gx.scatter_add(2, index[:, None].expand(flat.shape), flat * weight[:, None])
    return gx.to(gy.dtype).view(gy.shape).contiguous(memory_format=_format(gy))


class _Sample(Function):
    """Linear: its backward is `_Spread`, whose backward is this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, reflect: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(theta)
        ctx.reflect = reflect
        return torch.ops.fastgan.affine_grid_sample_forward(dense(x), theta, reflect)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gy is None or not needs_gradient(ctx, 0):
            return None, None, None
        return _Spread.apply(gy, ctx.saved_tensors[0], ctx.reflect), None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, theta: Tensor, reflect: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(theta)
        ctx.reflect = reflect
        return torch.ops.fastgan.affine_grid_sample_backward(dense(gy), theta, reflect)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None) -> tuple[Tensor | None, None, None]:
        if ggx is None or not needs_gradient(ctx, 0):
            return None, None, None
        return _Sample.apply(ggx, ctx.saved_tensors[0], ctx.reflect), None, None


# The shapes and strides that the compiled functions return.
PYTORCH_KERNELS = SimpleNamespace(
    affine_grid_sample_forward=_sample,
    affine_grid_sample_backward=_spread,
)
