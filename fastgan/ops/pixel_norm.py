"""Pixelwise feature vector normalization (Karras et al. 2018, "Progressive growing of GANs", section 4.2).

With r = (mean over channels of x^2 + eps)^(-1/2) and y = r x, means over channels written <.>, the derivatives are

    dx  = r (dy - y <dy y>)                                        first backward
    gdy = r (u - y <u y>)                                          second backward, u being the cotangent of dx
    gx  = r^2 (y (3 <u y> <dy y> - <u dy>) - u <dy y> - dy <u y>)

so y, which the next layer keeps anyway, and r are all that need be kept.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.autograd import asked, node_of
from fastgan.ops.backend import Op
from fastgan.ops.kernel_registry import (
    accumulate_dtype,
    add,
    check_features,
    dense,
    functions,
    ghost,
    kernels,
    like,
    no_third_order,
    number,
    tracked,
)

OP = Op("pixel_norm", kernels("pixel_norm"))


def pixel_norm(x: Tensor, eps: float = 1e-8, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean over channels of x^2 + eps).

    Args:
        x: [N, C, ...], any floating dtype; dimension 1 is the feature vector of a pixel.
        eps: added to the mean square.
        backend: as in `fastgan.ops.use_backend`.

    Returns:
        Same shape and dtype as `x`, and the same memory format; computed in float32 at least. First and second
        derivatives; a third raises in a kernel and works with backend="torch".

    Raises:
        TypeError: `x` has no floating dtype.
        ValueError: `x` has fewer than two dimensions, or `eps` is negative.
    """
    check_features(x)
    check_eps(eps)
    name = OP.choose(backend, x)
    if name == "torch":
        return reference(x, eps)
    settings = _Settings(functions("pixel_norm", name), eps)
    x = dense(x)
    if not tracked(x):
        return settings.f.pixel_norm_forward(x, eps)[0]
    return _PixelNorm.apply(node_of(x), settings)[0]


def check_eps(eps: float) -> None:
    if not number("eps", eps) >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def reference(x: Tensor, eps: float) -> Tensor:
    """Plain PyTorch, to any order. Squares of float16 overflow, and 1e-8 is 0 in it, hence float32."""
    wide = x.to(accumulate_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)


class _Settings(NamedTuple):
    """An implementation (functions as in `COMPOSED`) and the plain argument."""

    f: Any
    eps: float


class _PixelNorm(Function):
    """(y, r, ghost of x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, r = settings.f.pixel_norm_forward(x, settings.eps)
        origin = ghost(x)
        ctx.mark_non_differentiable(r)
        ctx.save_for_backward(origin, y, r)
        ctx.settings = settings
        return y, r, origin

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any, dorigin: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return dorigin, None
        origin, y, r = ctx.saved_tensors
        dx = _PixelNormBackward.apply(node_of(like(dy, y)), origin, y.detach(), r, ctx.settings)
        return add(dx, dorigin), None


class _PixelNormBackward(Function):
    """dx; of `origin`, the ghost of x, only the graph is used."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, origin: Tensor, y: Tensor, r: Tensor, settings: _Settings) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, origin, y, r)
        ctx.settings = settings
        return settings.f.pixel_norm_backward(dy, y, r)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> tuple[Any, ...]:
        if u is None:
            return (None,) * 5
        dy, origin, y, r = ctx.saved_tensors
        u = node_of(like(u, y))
        if not asked(ctx, 1):
            # As a function of dy alone it is linear and its own adjoint.
            return _PixelNormBackward.apply(u, origin, y, r, ctx.settings), None, None, None, None
        return *_PixelNormSecondBackward.apply(u, dy, origin, y, r, ctx.settings), None, None, None


class _PixelNormSecondBackward(Function):
    """(gdy, gx)."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dy: Tensor, origin: Tensor, y: Tensor, r: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return settings.f.pixel_norm_second_backward(u, dy, y, r)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if any(c is not None for c in cotangents):
            no_third_order("pixel_norm")
        return (None,) * 6


# The kernels' functions in plain PyTorch: they say in full what a kernel computes.


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: [N, C, ...]. Returns y, like x, and r: [N, 1, ...], contiguous, float32 (float64 for float64)."""
    wide = x.to(accumulate_dtype(x))
    r = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    return (wide * r).to(x.dtype), r.contiguous()


def backward(dy: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """dx, like y."""
    dtype, (dy, y) = y.dtype, (dy.to(r.dtype), y.to(r.dtype))
    return (r * (dy - y * (dy * y).mean(dim=1, keepdim=True))).to(dtype)


def second_backward(u: Tensor, dy: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """gdy and gx, like y; u is the cotangent of dx."""
    dtype, (u, dy, y) = y.dtype, (u.to(r.dtype), dy.to(r.dtype), y.to(r.dtype))
    m, q, s = ((a * b).mean(dim=1, keepdim=True) for a, b in ((dy, y), (u, y), (u, dy)))
    return (r * (u - y * q)).to(dtype), (r * r * (y * (3 * q * m - s) - u * m - dy * q)).to(dtype)


COMPOSED = SimpleNamespace(
    pixel_norm_forward=forward, pixel_norm_backward=backward, pixel_norm_second_backward=second_backward
)
