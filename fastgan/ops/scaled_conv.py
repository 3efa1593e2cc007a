"""`upsample_conv2d` and `conv2d_downsample` in Triton kernels: one 4x4 convolution of stride 2, or its adjoint.

The three products of `kernels/scaled_conv.py` (down, up, weight) are linear in each argument and each other's
derivatives, so every order is made of them, as in `fastgan.ops.conv`; each is computed only where it is asked for. The
first forward adds the bias and applies a piecewise linear act in the same pass; its derivative is `bias_act`'s, by the
sign of the output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.autograd import asked, autocast, node_of, without_autocast
from fastgan.ops.backend import Implementation
from fastgan.ops.bias_act import LINEAR, PIECEWISE_LINEAR, _BiasActBackward, _Settings, refuse_options
from fastgan.ops.kernel_registry import functions, kernels, like, tracked


def implementation() -> Implementation:
    """The entry of both ops for their `Op`."""
    found = kernels("scaled_conv")["triton"]

    def able(*inputs: Tensor | None, act: int = LINEAR, **options: Any) -> str | None:
        if act not in PIECEWISE_LINEAR:
            return "it takes the acts linear, relu and lrelu"
        return refuse_options(**options) or found.unsupported_reason(*inputs)

    def worth(*inputs: Tensor | None, **options: object) -> str:
        return "no GPU has measured it beside cuDNN yet; `make gpu` does"

    return replace(found, unsupported_reason=able, not_preferred_reason=worth)


def _products() -> Any:
    return functions("scaled_conv", "triton")


class _Down(Function):
    """small = down(large, w); _Up and _Weight are the other two."""

    @staticmethod
    def forward(ctx: Any, large: Tensor, w: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(large, w)
        return _products().down(large, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None
        large, w = ctx.saved_tensors
        return _up(g, w) if asked(ctx, 0) else None, _weight(g, large) if asked(ctx, 1) else None


class _Up(Function):
    @staticmethod
    def forward(ctx: Any, small: Tensor, w: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(small, w)
        return _products().up(small, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None
        small, w = ctx.saved_tensors
        return _down(g, w) if asked(ctx, 0) else None, _weight(small, g) if asked(ctx, 1) else None


class _Weight(Function):
    @staticmethod
    def forward(ctx: Any, small: Tensor, large: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(small, large)
        return _products().weight(small, large)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None
        small, large = ctx.saved_tensors
        return _down(large, g) if asked(ctx, 0) else None, _up(small, g) if asked(ctx, 1) else None


def _down(large: Tensor, w: Tensor) -> Tensor:
    return _Down.apply(node_of(large), node_of(w)) if torch.is_grad_enabled() else _products().down(large, w)


def _up(small: Tensor, w: Tensor) -> Tensor:
    return _Up.apply(node_of(small), node_of(w)) if torch.is_grad_enabled() else _products().up(small, w)


def _weight(small: Tensor, large: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _products().weight(small, large)
    return _Weight.apply(node_of(small), node_of(large))


class _Fused(Function):
    """y = act(way(x, w) + bias) gain, `way` being "down" or "up"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, way: str, settings: _Settings) -> Tensor:
        ctx.set_materialize_grads(False)
        y = getattr(_products(), way)(x, w, bias, *settings[1:])
        ctx.save_for_backward(x, w, bias, None if settings.act == LINEAR else y)
        ctx.way, ctx.settings = way, settings
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Any, ...]:
        if gy is None:
            return (None,) * 5
        x, w, bias, y = ctx.saved_tensors
        want_bias = bias is not None and asked(ctx, 2)
        if y is None:
            gz = gy if ctx.settings.gain == 1 else gy * ctx.settings.gain
            gb = gz.sum((0, 2, 3)) if want_bias else None
        else:
            gz, gb = _BiasActBackward.apply(node_of(like(gy, y)), None, None, y.detach(), ctx.settings, want_bias)
        back = _up if ctx.way == "down" else _down
        gx = back(gz, w) if asked(ctx, 0) else None
        gw = None
        if asked(ctx, 1):
            gw = _weight(gz, x) if ctx.way == "down" else _weight(x, gz)
        return gx, gw, None if gb is None else gb.to(bias.dtype), None, None


def scaled_conv(
    way: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    act: int = LINEAR,
    negative_slope: float = 0.2,
    gain: float = 1.0,
) -> Tensor:
    """act(way(x, w) + bias) gain in Triton kernels, differentiable to any order.

    Args:
        way: "down", x [N, C, 2H, 2W] -> [N, K, H, W], or "up", x [N, K, H, W] -> [N, C, 2H, 2W].
        x, w: w is [K, C, 4, 4]; bias: [K] down, [C] up, or None; act: index into `bias_act.ACTS`, piecewise linear.
    """
    x, w, bias = autocast(x, w, bias)
    settings = _Settings(functions("bias_act", "triton"), act, negative_slope, gain)
    with without_autocast(x):
        if not tracked(x, w, bias):
            return getattr(_products(), way)(x, w, bias, *settings[1:])
        return _Fused.apply(node_of(x), node_of(w), None if bias is None else node_of(bias), way, settings)
