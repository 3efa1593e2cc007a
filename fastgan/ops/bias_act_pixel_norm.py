"""The epilogue of a progressive GAN's generator layer, `pixel_norm(bias_act(x, bias))`, in one pass.

With z = act(x + bias) gain of a piecewise-linear act, s its slope (read off the sign of y), r and y as in
`pixel_norm`, w = s u, and means over channels written <.>:

    dx  = s r (dy - y <dy y>)                                           first backward
    gdy = r (w - y <w y>)                                               second backward, u being the cotangent of dx
    gx  = s r^2 (y (3 <w y> <dy y> - <w dy>) - w <dy y> - dy <w y>)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.autograd import asked, node_of
from fastgan.ops.backend import Op
from fastgan.ops.bias_act import ACTS, LINEAR, LRELU, PIECEWISE_LINEAR, bias_sum, check, refuse_options
from fastgan.ops.bias_act import reference as bias_act_reference
from fastgan.ops.kernel_registry import (
    accumulate_dtype,
    add,
    dense,
    functions,
    ghost,
    kernels,
    like,
    no_third_order,
    number,
    tracked,
)
from fastgan.ops.pixel_norm import backward as pixel_norm_backward
from fastgan.ops.pixel_norm import check_eps
from fastgan.ops.pixel_norm import forward as pixel_norm_forward
from fastgan.ops.pixel_norm import reference as pixel_norm_reference
from fastgan.ops.pixel_norm import second_backward as pixel_norm_second_backward


def _refuse(act: int = LRELU, **options: Any) -> str | None:
    if act not in PIECEWISE_LINEAR:
        return f"it takes {', '.join(ACTS[a] for a in PIECEWISE_LINEAR)}, not {ACTS[act]}"
    return refuse_options(**options)


OP = Op("bias_act_pixel_norm", kernels("bias_act_pixel_norm", _refuse))


def bias_act_pixel_norm(
    x: Tensor,
    bias: Tensor | None = None,
    act: str = "lrelu",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    eps: float = 1e-8,
    *,
    backend: str | None = None,
) -> Tensor:
    """pixel_norm(act(x + bias) * gain, eps).

    Args:
        x: [N, C, ...], any floating dtype.
        bias: [C], dtype of `x` or float32; or None.
        act, negative_slope, gain: as in `bias_act`; kernels take linear, relu and lrelu.
        eps: added to the mean square.
        backend: as in `fastgan.ops.use_backend`.

    Returns:
        Shape, dtype and memory format of `x`. First and second derivatives in `x` and `bias`; a third raises in a
        kernel and works with backend="torch". A kernel keeps its output and one float32 number a pixel for backward.

    Raises:
        TypeError: `x` or `bias` has another dtype.
        ValueError: shapes or devices do not fit, `act` is unknown, or `eps` is negative.
    """
    negative_slope, gain = number("negative_slope", negative_slope), number("gain", gain)
    code = check(x, bias, act)
    check_eps(eps)
    options = {"act": code, "negative_slope": negative_slope, "gain": gain}
    name = OP.choose(backend, *((x,) if bias is None else (x, bias)), **options)
    if name == "torch":
        return reference(x, bias, code, negative_slope, gain, eps)
    settings = _Settings(functions("bias_act_pixel_norm", name), code, negative_slope, gain, eps)
    x, bias = dense(x), None if bias is None else bias.contiguous()
    if not tracked(x, bias):
        return settings.f.bias_act_pixel_norm_forward(x, bias, *settings[1:])[0]
    return _BiasActPixelNorm.apply(node_of(x), None if bias is None else node_of(bias), settings)[0]


def reference(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float, eps: float) -> Tensor:
    """Plain PyTorch, to any order."""
    return pixel_norm_reference(bias_act_reference(x, bias, act, negative_slope, gain), eps)


class _Settings(NamedTuple):
    """An implementation (functions as in `COMPOSED`) and the plain arguments."""

    f: Any
    act: int
    negative_slope: float
    gain: float
    eps: float


class _BiasActPixelNorm(Function):
    """(y, r, ghost of x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, r = settings.f.bias_act_pixel_norm_forward(x, bias, *settings[1:])
        origin = ghost(x)
        ctx.mark_non_differentiable(r)
        ctx.save_for_backward(origin, bias, y, r)
        ctx.settings = settings
        return y, r, origin

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any, dorigin: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return dorigin, None, None
        origin, bias, y, r = ctx.saved_tensors
        want_bias = bias is not None and asked(ctx, 1)
        dy = node_of(like(dy, y))
        dx, db = _BiasActPixelNormBackward.apply(dy, origin, bias, y.detach(), r, ctx.settings, want_bias)
        return add(dx, dorigin), None if db is None else db.to(bias.dtype), None


class _BiasActPixelNormBackward(Function):
    """(dx, db or None); of `origin`, the ghost of x, and `bias` only the graph is used."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        origin: Tensor,
        bias: Tensor | None,
        y: Tensor,
        r: Tensor,
        settings: _Settings,
        want_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, origin, bias, y, r)
        ctx.settings = settings
        dx, db = settings.f.bias_act_pixel_norm_backward(dy, y, r, *settings[1:4], want_bias)
        return dx, db if want_bias else None

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, ub: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 7
        if u is None and ub is None:
            return nothing
        dy, origin, bias, y, r = ctx.saved_tensors
        settings = ctx.settings
        if ub is not None:  # db is the sum of dx over the rest: its cotangent is one of every dx
            ub = ub.to(y.dtype).view(-1, *[1] * (y.ndim - 2))
            u = ub.expand(y.shape) if u is None else u + ub
        assert u is not None
        u = node_of(like(u, y))
        want_bias = bias is not None and asked(ctx, 2)
        if settings.act != LRELU and not (want_bias or asked(ctx, 1)):
            # As a function of dy alone it is linear and its own adjoint. Not with lrelu, whose slope s does not commute
            # with the projection; relu's does, as y is 0 where it is.
            return _BiasActPixelNormBackward.apply(u, origin, bias, y, r, settings, False)[0], *nothing[1:]
        gdy, gx, gb = _BiasActPixelNormSecondBackward.apply(u, dy, origin, bias, y, r, settings, want_bias)
        return gdy, gx, None if gb is None else gb.to(bias.dtype), *nothing[3:]


class _BiasActPixelNormSecondBackward(Function):
    """(gdy, gx, gb or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dy: Tensor,
        origin: Tensor,
        bias: Tensor | None,
        y: Tensor,
        r: Tensor,
        settings: _Settings,
        want_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        gdy, gx, gb = settings.f.bias_act_pixel_norm_second_backward(u, dy, y, r, *settings[1:4], want_bias)
        return gdy, gx, gb if want_bias else None

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if any(c is not None for c in cotangents):
            no_third_order("bias_act_pixel_norm")
        return (None,) * 8


# The kernels' functions in plain PyTorch: they say in full what a kernel computes.


def forward(
    x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float, eps: float
) -> tuple[Tensor, Tensor]:
    """x: [N, C, ...]; bias: [C] in x's dtype or float32, or None. Returns y, like x, and r as in `pixel_norm`."""
    return pixel_norm_forward(bias_act_reference(x, bias, act, negative_slope, gain), eps)


def backward(
    dy: Tensor, y: Tensor, r: Tensor, act: int, negative_slope: float, gain: float, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx, like y, and db, its sum over all but dimension 1: float32 [C], or [0] unless `want_bias`."""
    dx = (pixel_norm_backward(dy.to(r.dtype), y.to(r.dtype), r) * _slope(y, act, negative_slope, gain)).to(y.dtype)
    return dx, bias_sum(dx, want_bias)


def second_backward(
    u: Tensor, dy: Tensor, y: Tensor, r: Tensor, act: int, negative_slope: float, gain: float, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """gdy and gx, like y, and gb, the sum of gx over all but dimension 1, as db; u is the cotangent of dx."""
    s = _slope(y, act, negative_slope, gain)
    gdy, gz = pixel_norm_second_backward(u.to(r.dtype) * s, dy.to(r.dtype), y.to(r.dtype), r)
    gx = (gz * s).to(y.dtype)
    return gdy.to(y.dtype), gx, bias_sum(gx, want_bias)


def _slope(y: Tensor, act: int, negative_slope: float, gain: float) -> Tensor | float:
    if act == LINEAR:
        return gain
    positive = y.new_tensor(gain, dtype=accumulate_dtype(y))
    return torch.where(y > 0, positive, negative_slope * gain if act == LRELU else 0.0)


COMPOSED = SimpleNamespace(
    bias_act_pixel_norm_forward=forward,
    bias_act_pixel_norm_backward=backward,
    bias_act_pixel_norm_second_backward=second_backward,
)
