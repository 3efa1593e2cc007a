"""`pixel_norm(bias_act(x, bias))`, the epilogue of a progressive GAN's generator layer, in one pass.

With z = act(x + bias) gain for a piecewise linear act, s its slope (read off the sign of y), r and y as in
`pixel_norm`, w = s u, and <.> the mean over channels:

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

from fastgan.ops.arguments import accumulation_dtype, dense, dense_like, require_eps, require_number
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
from fastgan.ops.bias_act import (
    ACTS,
    LINEAR,
    LRELU,
    PIECEWISE_LINEAR,
    bias_sum,
    classify,
    require_bias_and_act,
    unsupported_options,
)
from fastgan.ops.bias_act import reference as bias_act_reference
from fastgan.ops.dispatch.backend import Op, in_transform
from fastgan.ops.dispatch.kernel_registry import kernel_functions, kernel_implementations
from fastgan.ops.fallthrough import fall_through, foreign
from fastgan.ops.pixel_norm import backward as pixel_norm_backward
from fastgan.ops.pixel_norm import forward as pixel_norm_forward
from fastgan.ops.pixel_norm import reference as pixel_norm_reference
from fastgan.ops.pixel_norm import second_backward as pixel_norm_second_backward


def _unsupported_options(act: int = LRELU, **options: Any) -> str | None:
    if act not in PIECEWISE_LINEAR:
        return f"it supports {', '.join(ACTS[a] for a in PIECEWISE_LINEAR)}, not {ACTS[act]}"
    return unsupported_options(**options)


OP = Op(
    "bias_act_pixel_norm",
    kernel_implementations("bias_act_pixel_norm", _unsupported_options),
    classify=classify,
    variant=("act",),
)


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

    First and second derivatives in `x` and `bias`; a third raises, except with backend="torch". For the backward a
    kernel keeps its output and one float32 number for each pixel.

    Args:
        x: [N, C, ...], any floating-point dtype.
        bias: [C], dtype of `x` or float32; or None.
        act: as in `bias_act`; kernels support linear, relu and lrelu.
        negative_slope: of lrelu.
        gain: factor of the act's result; kernels support positive ones.
        eps: added to the mean square.
        backend: as in `fastgan.ops.use_backend`.

    Returns:
        Shape, dtype and memory format of `x`.

    Raises:
        TypeError: a dtype that does not fit, or an argument that is not a number.
        ValueError: shapes or devices that do not fit, an unknown `act`, or a negative `eps`.
    """
    negative_slope, gain = require_number("negative_slope", negative_slope), require_number("gain", gain)
    if foreign(x, bias) and not in_transform():
        given = (act, negative_slope, gain, eps)
        return fall_through(OP, bias_act_pixel_norm, _plain, (x, bias), *given, backend=backend)
    code = require_bias_and_act(x, bias, act)
    require_eps(eps)
    options = {"act": code, "negative_slope": negative_slope, "gain": gain}
    name = OP.choose(backend, *((x,) if bias is None else (x, bias)), **options)
    if name == "torch":
        return reference(x, bias, code, negative_slope, gain, eps)
    settings = _Settings(kernel_functions("bias_act_pixel_norm", name), code, negative_slope, gain, eps)
    x, bias = dense(x), None if bias is None else bias.contiguous()
    if not tracked(x, bias):
        return settings.kernels.bias_act_pixel_norm_forward(x, bias, *settings[1:])[0]
    return _BiasActPixelNorm.apply(non_leaf(x), None if bias is None else non_leaf(bias), settings)[0]


def _plain(x: Tensor, bias: Tensor | None, act: str, negative_slope: float, gain: float, eps: float) -> Tensor:
    require_eps(eps)
    return reference(x, bias, require_bias_and_act(x, bias, act), negative_slope, gain, eps)


def reference(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float, eps: float) -> Tensor:
    """Plain PyTorch, differentiable to any order."""
    return pixel_norm_reference(bias_act_reference(x, bias, act, negative_slope, gain), eps)


class _Settings(NamedTuple):
    """Arguments of the Functions besides tensors; `kernels` has the functions of `PYTORCH_KERNELS`."""

    kernels: Any
    act: int
    negative_slope: float
    gain: float
    eps: float


class _BiasActPixelNorm(Function):
    """Returns y, r and the placeholder of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, r = settings.kernels.bias_act_pixel_norm_forward(x, bias, *settings[1:])
        origin = placeholder(x)
        ctx.mark_non_differentiable(r)
        ctx.save_for_backward(form_tag(), origin, bias, kept(y), r)
        ctx.settings = settings
        return y, r, origin

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any, dorigin: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return dorigin, None, None
        _, origin, bias, y, r = ctx.saved_tensors
        need_bias = bias is not None and needs_gradient(ctx, 1)
        dy = non_leaf(dense_like(dy, y))
        dx, db = _BiasActPixelNormBackward.apply(dy, origin, bias, y.detach(), r, ctx.settings, need_bias)
        return add_gradients(dx, dorigin), None if db is None else db.to(bias.dtype), None


class _BiasActPixelNormBackward(Function):
    """Returns dx and db or None. `origin`, the placeholder of x, and `bias` are there for the graph alone."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        origin: Tensor,
        bias: Tensor | None,
        y: Tensor,
        r: Tensor,
        settings: _Settings,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, origin, bias, y, r)
        ctx.settings = settings
        dx, db = settings.kernels.bias_act_pixel_norm_backward(dy, y, r, *settings[1:4], need_bias)
        return dx, db if need_bias else None

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, ub: Tensor | None) -> tuple[Any, ...]:
        none = (None,) * 7
        if u is None and ub is None:
            return none
        dy, origin, bias, y, r = ctx.saved_tensors
        settings = ctx.settings
        if ub is not None:  # db is a sum of dx, so its cotangent is one of every element of dx
            ub = ub.to(y.dtype).view(-1, *[1] * (y.ndim - 2))
            u = ub.expand(y.shape) if u is None else u + ub
        assert u is not None
        u = non_leaf(dense_like(u, y))
        need_bias = bias is not None and needs_gradient(ctx, 2)
        if settings.act != LRELU and not (need_bias or needs_gradient(ctx, 1)):
            # As a function of dy alone it is linear and self-adjoint. Not with lrelu, whose slope s does not commute
            # with the projection; relu's does, as y is 0 where s is.
            return _BiasActPixelNormBackward.apply(u, origin, bias, y, r, settings, False)[0], *none[1:]

        def kernel(u: Tensor, dy: Tensor, origin: Tensor, bias: Tensor | None, y: Tensor, r: Tensor) -> tuple[Any, ...]:
            function = settings.kernels.bias_act_pixel_norm_second_backward
            return function(u, dy, y, r, *settings[1:4], need_bias)

        gdy, gx, gb = SecondBackward.apply("bias_act_pixel_norm", kernel, u, dy, origin, bias, y, r)
        gb = gb if need_bias else None
        return gdy, gx, None if gb is None else gb.to(bias.dtype), *none[3:]


# The kernels' functions in plain PyTorch: the specification of what a kernel computes.


def forward(
    x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns y, like x: [N, C, ...], and r as in `pixel_norm`; bias: [C] in x's dtype or float32, or None."""
    return pixel_norm_forward(bias_act_reference(x, bias, act, negative_slope, gain), eps)


def backward(
    dy: Tensor, y: Tensor, r: Tensor, act: int, negative_slope: float, gain: float, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns dx, like y, and db, its sum over all but dimension 1: float32 [C], or [0] unless `need_bias`."""
    dx = (pixel_norm_backward(dy.to(r.dtype), y.to(r.dtype), r) * _slope(y, act, negative_slope, gain)).to(y.dtype)
    return dx, bias_sum(dx, need_bias)


def second_backward(
    u: Tensor, dy: Tensor, y: Tensor, r: Tensor, act: int, negative_slope: float, gain: float, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gdy and gx, like y, and gb, the sum of gx as db in `backward`; u is the cotangent of dx."""
    s = _slope(y, act, negative_slope, gain)
    gdy, gz = pixel_norm_second_backward(u.to(r.dtype) * s, dy.to(r.dtype), y.to(r.dtype), r)
    gx = (gz * s).to(y.dtype)
    return gdy.to(y.dtype), gx, bias_sum(gx, need_bias)


def _slope(y: Tensor, act: int, negative_slope: float, gain: float) -> Tensor | float:
    if act == LINEAR:
        return gain
    positive = y.new_tensor(gain, dtype=accumulation_dtype(y))
    return torch.where(y > 0, positive, negative_slope * gain if act == LRELU else 0.0)


PYTORCH_KERNELS = SimpleNamespace(
    bias_act_pixel_norm_forward=forward,
    bias_act_pixel_norm_backward=backward,
    bias_act_pixel_norm_second_backward=second_backward,
)
