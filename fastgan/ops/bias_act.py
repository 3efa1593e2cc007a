"""Bias and activation in one pass, with second derivatives that cost nothing where they are nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.autograd import asked, node_of
from fastgan.ops.backend import LEAN, Op, forward_mode, transformed
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
    plain,
    tracked,
)

# The kernels take an act as its index here.
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "silu")
LINEAR, RELU, LRELU, TANH, SIGMOID, SILU = range(len(ACTS))
# Their second derivative is zero: nothing is sent anywhere.
PIECEWISE_LINEAR = (LINEAR, RELU, LRELU)


def refuse_options(negative_slope: float = 0.0, gain: float = 1.0, **options: object) -> str | None:
    """Why kernels cannot run with these options: they read the activation's slope off the sign of its output."""
    if not (gain > 0 and math.isfinite(gain)):
        return f"it takes a positive gain, not {gain}"
    if not (negative_slope >= 0 and math.isfinite(negative_slope)):
        return f"it takes a negative_slope of 0 or more, not {negative_slope}"
    return None


def _lean_able(*inputs: Tensor, **options: Any) -> str | None:
    if options.get("act", LRELU) not in PIECEWISE_LINEAR:
        return f"{ACTS[options['act']]} curves"
    return refuse_options(**options)


# Elements up to which PyTorch's own ops take less time than an autograd Function of Python's does to be made.
SMALL = 2**17


def _worth(*inputs: Tensor, act: int = LRELU, **_: Any) -> str | None:
    """Not for lrelu of few elements, see `_small`."""
    small = inputs and act == LRELU and inputs[0].numel() <= SMALL and inputs[0].dtype == torch.float32
    return f"up to {SMALL} elements PyTorch's own ops take less time" if small and not forward_mode() else None


_KERNELS = kernels("bias_act", refuse_options)
OP = Op(
    "bias_act",
    {
        **_KERNELS,
        "cpp": replace(_KERNELS["cpp"], not_preferred_reason=_worth),
        "lean": replace(LEAN, unsupported_reason=_lean_able),
    },
    forward_mode=True,
)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    act: str = "lrelu",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """act(x + bias) * gain.

    Args:
        x: [N, C, ...], any floating dtype.
        bias: [C], dtype of `x` or float32; or None.
        act: "linear", "relu", "lrelu", "tanh", "sigmoid" or "silu".
        negative_slope: of lrelu.
        gain: factor of the result; a kernel takes positive ones.
        backend: as in `fastgan.ops.use_backend`.

    Returns:
        Shape and dtype of `x`. First and second derivatives in `x` and `bias`; a third raises, but for linear, relu
        and lrelu, where all are right, and for backend="torch". Those three send nothing back in second order: `x` and
        `bias` get no gradient from a penalty through their curvature, which is zero (None under `autograd.grad`, which
        needs `allow_unused=True`).

    Raises:
        TypeError: `x` or `bias` has another dtype, or `negative_slope` or `gain` is no number (a tensor among them: it
            would get no gradient).
        ValueError: shapes or devices do not fit, or `act` is unknown.
    """
    negative_slope, gain = number("negative_slope", negative_slope), number("gain", gain)
    if act == "lrelu" and OP.free(backend) and _is_small(x, bias):
        small = _small if tracked(x, bias) else reference
        return small(x, bias, LRELU, negative_slope, gain)
    code = check(x, bias, act)
    options = {"act": code, "negative_slope": negative_slope, "gain": gain}
    name = OP.choose(backend, *((x,) if bias is None else (x, bias)), **options)
    if name == "torch" or (name == "lean" and transformed()) or (forward_mode() and code not in PIECEWISE_LINEAR):
        return reference(x, bias, code, negative_slope, gain)
    settings = _Settings(COMPOSED if name == "lean" else functions("bias_act", name), code, negative_slope, gain)
    x, bias = dense(x), None if bias is None else bias.contiguous()
    if not tracked(x, bias):
        return settings.f.bias_act_forward(x, bias, *settings[1:])
    function = _BiasActForwardMode if forward_mode() else _BiasAct
    return function.apply(node_of(x), None if bias is None else node_of(bias), settings)[0]


def check(x: Tensor, bias: Tensor | None, act: str) -> int:
    """Index of `act`; raises for arguments that do not fit."""
    check_features(x)
    if act not in ACTS:
        raise ValueError(f"act must be {', '.join(ACTS)}, got {act!r}")
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias must be {x.dtype}, as x, or torch.float32, got dtype {bias.dtype}")
        if bias.shape != x.shape[1:2]:
            raise ValueError(f"bias must be [{x.shape[1]}], as x has channels, got shape {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on {x.device}, as x, got {bias.device}")
    return ACTS.index(act)


def with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias along dimension 1, in x's dtype."""
    if bias is None:
        return x
    if bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return x + bias.view(-1, *[1] * (x.ndim - 2))


def reference(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    """Plain PyTorch, to any order."""
    y = with_bias(x, bias)
    if act == RELU:
        y = torch.relu(y)
    elif act == LRELU:
        y = F.leaky_relu(y, negative_slope)
    elif act == TANH:
        y = torch.tanh(y)
    elif act == SIGMOID:
        y = torch.sigmoid(y)
    elif act == SILU:
        y = F.silu(y)
    y = y if gain == 1 else y * gain
    return y.clone() if y is x else y  # it may be changed in place, as a kernel's result may


with torch.inference_mode(False):  # what inference makes could never be part of training
    _ONE = torch.ones((), device="cpu")


def _is_small(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `_small` is the way to go; also no, and left to `check`, where x and bias do not fit."""
    if not plain(x) or x.dtype != torch.float32 or x.numel() > SMALL or not x.is_cpu or x.ndim < 2:
        return False
    if bias is None:
        return True
    fits = isinstance(bias, Tensor) and bias.dtype == torch.float32 and bias.is_cpu
    return fits and bias.shape == x.shape[1:2]


def _small(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    """lrelu as a product with its slope, a constant: PyTorch's derivatives of that send no zeros back."""
    y = with_bias(x, bias)
    # The gradient of lrelu for a cotangent of 1 is the slope, in one pass.
    y = y * torch.ops.aten.leaky_relu_backward.default(_ONE, y.detach(), negative_slope, False)
    return y if gain == 1 else y * gain


class _Settings(NamedTuple):
    """What the Functions take besides tensors: an implementation (functions as in `COMPOSED`) and plain arguments."""

    f: Any
    act: int
    negative_slope: float
    gain: float


def _silu_bias(bias: Tensor | None, settings: _Settings) -> Tensor | None:
    """What a backward kernel needs of the bias: the others see x + bias in their output."""
    return bias if settings.act == SILU else None


class _BiasAct(Function):
    """(y, ghost of x); the ghost only where the act curves and y alone is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        y = settings.f.bias_act_forward(x, bias, *settings[1:])
        origin = ghost(x) if settings.act in (TANH, SIGMOID) else None
        if settings.act == SILU:
            ctx.save_for_backward(None, x, bias)
        else:
            ctx.save_for_backward(None if settings.act == LINEAR else y, origin, bias)
        ctx.settings = settings
        return y, origin

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dorigin: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return dorigin, None, None
        y, origin, bias = ctx.saved_tensors
        ref = origin if y is None else y
        dx, db = _backward(
            dense(dy) if ref is None else like(dy, ref),
            origin,
            None if ctx.settings.act in PIECEWISE_LINEAR else bias,
            ref,
            ctx.settings,
            bias is not None and asked(ctx, 1),
        )
        return add(dx, dorigin), None if db is None else db.to(bias.dtype), None


class _BiasActForwardMode(_BiasAct):
    """Of the acts that do not curve. Apart because torch.compile takes no Function with a `jvp`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor | None]:
        y, origin = _BiasAct.forward(ctx, x, bias, settings)
        ctx.save_for_forward(y)
        return y, origin

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tbias: Tensor | None, _: None) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if tx is None:
            tx = torch.zeros((), dtype=y.dtype, device=y.device).expand_as(y)
        t = with_bias(tx, tbias)
        ref = None if ctx.settings.act == LINEAR else y.detach()
        t = dense(t) if ref is None else like(t, ref)
        return _run_backward(t, None, None, ref, ctx.settings, False)[0], None


def _backward(
    dy: Tensor, origin: Tensor | None, bias: Tensor | None, ref: Tensor | None, settings: _Settings, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """`_run_backward`; inside a level of forward mode in plain PyTorch, as `dy` may have a tangent."""
    if forward_mode() and (settings.act in PIECEWISE_LINEAR or not torch.is_grad_enabled()):
        dx, db = backward(dy, ref, _silu_bias(bias, settings), *settings[1:], want_bias)
        return dx, db if want_bias else None
    return _run_backward(dy, origin, bias, ref, settings, want_bias)


def _run_backward(
    dy: Tensor, origin: Tensor | None, bias: Tensor | None, ref: Tensor | None, settings: _Settings, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """`_BiasActBackward`, or where nothing is recorded its function: a Function would cost its making alone."""
    if torch.is_grad_enabled():
        ref = None if ref is None else ref.detach()
        return _BiasActBackward.apply(node_of(dy), origin, bias, ref, settings, want_bias)
    dx, db = settings.f.bias_act_backward(dy, ref, _silu_bias(bias, settings), *settings[1:], want_bias)
    return dx, db if want_bias else None


class _BiasActBackward(Function):
    """(dx, db or None). Of `origin`, x or its ghost, only the graph is used: `ref` has the values."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        origin: Tensor | None,
        bias: Tensor | None,
        ref: Tensor | None,
        settings: _Settings,
        want_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        dx, db = settings.f.bias_act_backward(dy, ref, _silu_bias(bias, settings), *settings[1:], want_bias)
        piecewise = settings.act in PIECEWISE_LINEAR
        ctx.save_for_backward(*(None, None, None) if piecewise else (dy, origin, bias), ref)
        ctx.settings, ctx.shape, ctx.dtype = settings, dy.shape, dy.dtype
        return dx, db if want_bias else None

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, ub: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 6
        if u is None and ub is None:
            return nothing
        dy, origin, bias, ref = ctx.saved_tensors
        settings, shape = ctx.settings, ctx.shape
        if ub is not None:  # db is the sum of dx over the rest: its cotangent is one of every dx
            ub = ub.to(ctx.dtype).view(-1, *[1] * (len(shape) - 2))
            u = ub.expand(shape) if u is None else u + ub
        assert u is not None
        u = dense(u) if ref is None else like(u, ref)
        if settings.act in PIECEWISE_LINEAR:
            # Linear in dy and its own adjoint; the bends of the act count for nothing.
            return _backward(u, None, None, ref, settings, False)[0], *nothing[1:]
        want_bias = bias is not None and asked(ctx, 2)
        if not (want_bias or asked(ctx, 1)):
            # As a function of dy alone it is its own adjoint here too.
            return _backward(u, origin, bias, ref, settings, False)[0], *nothing[1:]
        gdy, gx, gb = _BiasActSecondBackward.apply(node_of(u), dy, origin, bias, ref, settings, want_bias)
        return gdy, gx, None if gb is None else gb.to(bias.dtype), *nothing[3:]


class _BiasActSecondBackward(Function):
    """(gdy, gx, gb or None) of the acts that curve."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dy: Tensor,
        origin: Tensor,
        bias: Tensor | None,
        ref: Tensor,
        settings: _Settings,
        want_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        bias = _silu_bias(bias, settings)
        gdy, gx, gb = settings.f.bias_act_second_backward(u, dy, ref, bias, *settings[1:], want_bias)
        return gdy, gx, gb if want_bias else None

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if any(c is not None for c in cotangents):
            no_third_order("bias_act")
        return (None,) * 7


# The kernels' functions in plain PyTorch: what runs as `lean`, and what says in full what a kernel computes.


def forward(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    """x: [N, C, ...]; bias: [C] in x's dtype or float32, or None. Returns y, like x."""
    return reference(x, bias, act, negative_slope, gain)


def backward(
    dy: Tensor, ref: Tensor | None, bias: Tensor | None, act: int, negative_slope: float, gain: float, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx = dy act'(x + bias) gain, and db, its sum over all but dimension 1.

    ref: y for relu, lrelu, tanh and sigmoid, x for silu, None for linear; bias: for silu alone.
    Returns dx, like dy, and db: float32 [C], or [0] unless `want_bias`.
    """
    if act == LINEAR:
        dx = dy
    elif act == RELU:
        dx = torch.ops.aten.threshold_backward(dy, ref, 0)
    elif act == LRELU:
        dx = torch.ops.aten.leaky_relu_backward(dy, ref, negative_slope, True)
    else:
        assert ref is not None
        dx = (dy * _slope(ref, bias, act, gain)[0]).to(dy.dtype)
    dx = dx if gain == 1 else dx * gain
    return dx, bias_sum(dx, want_bias)


def second_backward(
    u: Tensor,
    dy: Tensor,
    ref: Tensor,
    bias: Tensor | None,
    act: int,
    negative_slope: float,
    gain: float,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of dx with cotangent u, like dy: gdy = u act' gain; gx = u dy act'' gain; gb, the sum of gx over all but dim 1.

    For tanh, sigmoid and silu: the second backward of the others is `backward` with u for dy. gb as db in `backward`.
    """
    first, second = _slope(ref, bias, act, gain)
    gx = (u * gain * dy * second).to(dy.dtype)
    return (u * gain * first).to(dy.dtype), gx, bias_sum(gx, want_bias)


def _slope(ref: Tensor, bias: Tensor | None, act: int, gain: float) -> tuple[Tensor, Tensor]:
    """act' and act'' of tanh, sigmoid and silu, float32 at least."""
    ref = ref.to(accumulate_dtype(ref))
    if act == TANH:
        t = ref / gain
        first = 1 - t * t
        return first, -2 * t * first
    if act == SIGMOID:
        s = ref / gain
        first = s * (1 - s)
        return first, first * (1 - 2 * s)
    x = with_bias(ref, bias)
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


def bias_sum(dx: Tensor, want_bias: bool) -> Tensor:
    """Sum over all but dimension 1, float32 at least; empty unless wanted."""
    dtype = accumulate_dtype(dx)
    if not want_bias:
        return dx.new_empty(0, dtype=dtype)
    return dx.sum([0, *range(2, dx.ndim)], dtype=dtype)


COMPOSED = SimpleNamespace(
    bias_act_forward=forward, bias_act_backward=backward, bias_act_second_backward=second_backward
)
