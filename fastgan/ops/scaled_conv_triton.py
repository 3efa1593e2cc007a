"""Autograd of the Triton kernels of `upsample_conv2d` and `conv2d_downsample`: 4x4 convolutions of stride 2.

The three products of `kernels/scaled_conv.py` (down, up, weight) are linear in each argument and each other's
derivatives, so they make up every order, as in `fastgan.ops.conv`; each is computed only where it is needed. The first
forward adds the bias and applies a piecewise linear act in the same pass. The derivative of the act is `bias_act`'s, by
the sign of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import dense_like
from fastgan.ops.autograd import autocast, form_tag, needs_gradient, non_leaf, tracked, without_autocast
from fastgan.ops.bias_act import LINEAR, PIECEWISE_LINEAR, BiasActBackward, BiasActSettings, unsupported_options
from fastgan.ops.dispatch.backend import Implementation
from fastgan.ops.dispatch.kernel_registry import kernel_functions, kernel_implementations, no_products_reason


def triton_implementation() -> Implementation:
    """The entry of both ops for their `Op`."""
    entry = kernel_implementations("scaled_conv")["triton"]

    def unsupported_reason(*inputs: Tensor | None, act: int = LINEAR, **options: Any) -> str | None:
        if act not in PIECEWISE_LINEAR:
            return "it supports the acts linear, relu and lrelu"
        reason = unsupported_options(**options) or entry.unsupported_reason(*inputs)
        first = next((x for x in inputs if x is not None), None)
        return reason or (None if first is None else no_products_reason(first.device.index))

    def not_preferred_reason(*inputs: Tensor | None, **options: object) -> str:
        return "not yet compared with cuDNN on a GPU; `make gpu` does that"

    return replace(entry, unsupported_reason=unsupported_reason, not_preferred_reason=not_preferred_reason)


def _products() -> Any:
    """The functions down(large, w), up(small, w) and weight(small, large)."""
    return kernel_functions("scaled_conv", "triton")


# The gradients of each product in its two arguments, for the cotangent g.
_GRADIENTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "down": (lambda g, large, w: _product("up", g, w), lambda g, large, w: _product("weight", g, large)),
    "up": (lambda g, small, w: _product("down", g, w), lambda g, small, w: _product("weight", small, g)),
    "weight": (lambda g, small, large: _product("down", large, g), lambda g, small, large: _product("up", small, g)),
}


class _Product(Function):
    """One of the three products, whose gradients are the other two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b)
        ctx.name = name
        return getattr(_products(), name)(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        gradients = (
            function(g, *ctx.saved_tensors) if needs_gradient(ctx, i) else None
            for i, function in enumerate(_GRADIENTS[ctx.name])
        )
        return *gradients, None


def _product(name: str, a: Tensor, b: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return getattr(_products(), name)(a, b)
    return _Product.apply(non_leaf(a), non_leaf(b), name)


class _Fused(Function):
    """y = act(down(x, w) + bias) gain, or `up` for `down`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, direction: str, settings: BiasActSettings
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        y = getattr(_products(), direction)(x, w, bias, *settings[1:])
        ctx.save_for_backward(form_tag(), x, w, bias, None if settings.act == LINEAR else y)
        ctx.direction, ctx.settings = direction, settings
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Any, ...]:
        if gy is None:
            return (None,) * 5
        _, x, w, bias, y = ctx.saved_tensors
        need_bias = bias is not None and needs_gradient(ctx, 2)
        if y is None:
            gz = gy if ctx.settings.gain == 1 else gy * ctx.settings.gain
            gb = gz.sum((0, 2, 3)) if need_bias else None
        else:
            gz, gb = BiasActBackward.apply(non_leaf(dense_like(gy, y)), None, None, y.detach(), ctx.settings, need_bias)
        gradient_x, gradient_w = _GRADIENTS[ctx.direction]
        gx = gradient_x(gz, x, w) if needs_gradient(ctx, 0) else None
        gw = gradient_w(gz, x, w) if needs_gradient(ctx, 1) else None
        return gx, gw, None if gb is None else gb.to(bias.dtype), None, None


def scaled_conv(
    direction: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    act: int = LINEAR,
    negative_slope: float = 0.2,
    gain: float = 1.0,
) -> Tensor:
    """act(down(x, w) + bias) gain, or `up` for `down`, in Triton kernels; differentiable to any order.

    Args:
        direction: "down" or "up".
        x: [N, C, 2H, 2W], down to [N, K, H, W]; or [N, K, H, W], up to [N, C, 2H, 2W].
        w: [K, C, 4, 4].
        bias: [K] down, [C] up, or None.
        act: index of a piecewise linear act in `bias_act.ACTS`.
        negative_slope: of lrelu.
        gain: factor of the result.
    """
    x, w, bias = autocast(x, w, bias)
    settings = BiasActSettings(kernel_functions("bias_act", "triton"), act, negative_slope, gain)
    with without_autocast(x):
        if not tracked(x, w, bias):
            return getattr(_products(), direction)(x, w, bias, *settings[1:])
        return _Fused.apply(non_leaf(x), non_leaf(w), None if bias is None else non_leaf(bias), direction, settings)
