"""Pixelwise feature vector normalization (Karras et al. 2018, "Progressive growing of GANs", section 4.2).

With r = (<x^2> + eps)^(-1/2) and y = r x, where <.> is the mean over channels, the derivatives are

    dx  = r (dy - y <dy y>)                                        first backward
    gdy = r (u - y <u y>)                                          second backward, u being the cotangent of dx
    gx  = r^2 (y (3 <u y> <dy y> - <u dy>) - u <dy y> - dy <u y>)

so it is enough to keep r and y, which the next layer keeps anyway.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import accumulation_dtype, dense, dense_like, require_eps, require_feature_map
from fastgan.ops.autograd import (
    SecondBackward,
    add_gradients,
    form_tag,
    kept,
    needs_gradient,
    non_leaf,
    placeholder,
    tracked,
)
from fastgan.ops.dispatch.backend import Op, by_size, in_transform
from fastgan.ops.dispatch.kernel_registry import kernel_functions, kernel_implementations
from fastgan.ops.fallthrough import fall_through, foreign

OP = Op("pixel_norm", kernel_implementations("pixel_norm"), classify=by_size)


def pixel_norm(x: Tensor, eps: float = 1e-8, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean over channels of x^2 + eps).

    Args:
        x: [N, C, ...], any floating-point dtype; dimension 1 is the feature vector of a pixel.
        eps: added to the mean square.
        backend: as in `fastgan.ops.use_backend`.

    Returns:
        Shape, dtype and memory format of `x`; computed in float32 at least. It has first and second derivatives; a
        third raises, except with backend="torch".

    Raises:
        TypeError: the dtype of `x` is not floating-point.
        ValueError: `x` has fewer than two dimensions, or `eps` is negative.
    """
    if foreign(x) and not in_transform():
        return fall_through(OP, pixel_norm, _plain, (x,), eps, backend=backend)
    require_feature_map(x)
    require_eps(eps)
    name = OP.choose(backend, x)
    if name == "torch":
        return reference(x, eps)
    settings = _Settings(kernel_functions("pixel_norm", name), eps)
    x = dense(x)
    if not tracked(x):
        return settings.kernels.pixel_norm_forward(x, eps)[0]
    return _PixelNorm.apply(non_leaf(x), settings)[0]


def _plain(x: Tensor, eps: float) -> Tensor:
    require_feature_map(x)
    require_eps(eps)
    return reference(x, eps)


def reference(x: Tensor, eps: float) -> Tensor:
    """Plain PyTorch, differentiable to any order; in float32, as in float16 squares overflow and 1e-8 is 0."""
    wide = x.to(accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)


class _Settings(NamedTuple):
    """Arguments of the Functions besides tensors; `kernels` has the functions of `PYTORCH_KERNELS`."""

    kernels: Any
    eps: float


class _PixelNorm(Function):
    """Returns y, r and the placeholder of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, r = settings.kernels.pixel_norm_forward(x, settings.eps)
        origin = placeholder(x)
        ctx.mark_non_differentiable(r)
        ctx.save_for_backward(form_tag(), origin, kept(y), r)
        ctx.settings = settings
        return y, r, origin

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any, dorigin: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return dorigin, None
        _, origin, y, r = ctx.saved_tensors
        dx = _PixelNormBackward.apply(non_leaf(dense_like(dy, y)), origin, y.detach(), r, ctx.settings)
        return add_gradients(dx, dorigin), None


class _PixelNormBackward(Function):
    """Returns dx. `origin`, the placeholder of x, represents x in the graph."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, origin: Tensor, y: Tensor, r: Tensor, settings: _Settings) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, origin, y, r)
        ctx.settings = settings
        return settings.kernels.pixel_norm_backward(dy, y, r)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> tuple[Any, ...]:
        if u is None:
            return (None,) * 5
        dy, origin, y, r = ctx.saved_tensors
        u = non_leaf(dense_like(u, y))
        if not needs_gradient(ctx, 1):
            # As a function of dy alone it is linear and self-adjoint.
            return _PixelNormBackward.apply(u, origin, y, r, ctx.settings), None, None, None, None

        def kernel(u: Tensor, dy: Tensor, origin: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            return ctx.settings.kernels.pixel_norm_second_backward(u, dy, y, r)

        return *SecondBackward.apply("pixel_norm", kernel, u, dy, origin, y, r), None, None, None


# The kernels' functions in plain PyTorch: the specification of what a kernel computes.


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y, like x: [N, C, ...], and r: [N, 1, ...], contiguous, float32 (float64 for float64)."""
    wide = x.to(accumulation_dtype(x))
    r = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    return (wide * r).to(x.dtype), r.contiguous()


def backward(dy: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Returns dx, like y."""
    dtype, (dy, y) = y.dtype, (dy.to(r.dtype), y.to(r.dtype))
    return (r * (dy - y * (dy * y).mean(dim=1, keepdim=True))).to(dtype)


def second_backward(u: Tensor, dy: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gdy and gx, like y; u is the cotangent of dx."""
    dtype, (u, dy, y) = y.dtype, (u.to(r.dtype), dy.to(r.dtype), y.to(r.dtype))
    m, q, s = ((a * b).mean(dim=1, keepdim=True) for a, b in ((dy, y), (u, y), (u, dy)))
    return (r * (u - y * q)).to(dtype), (r * r * (y * (3 * q * m - s) - u * m - dy * q)).to(dtype)


PYTORCH_KERNELS = SimpleNamespace(
    pixel_norm_forward=forward, pixel_norm_backward=backward, pixel_norm_second_backward=second_backward
)
