"""Bias and activation in one pass; second derivatives that are zero are not computed."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from fastgan.ops.arguments import (
    SMALL_NUMEL,
    accumulation_dtype,
    dense,
    dense_like,
    is_plain_tensor,
    require_feature_map,
    require_number,
)
from fastgan.ops.autograd import (
    SecondBackward,
    add_gradients,
    form_tag,
    kept,
    needs_gradient,
    non_leaf,
    placeholder,
    tagged,
    tracked,
)
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import LEAN, NATIVE, Op, in_transform, size_class
from fastgan.ops.dispatch.kernel_registry import kernel_functions, kernel_implementations
from fastgan.ops.dispatch.torch_private import in_forward_mode, leaky_relu_backward
from fastgan.ops.fallthrough import fall_through, foreign

# Kernels get an act as its index in this list.
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "silu")
LINEAR, RELU, LRELU, TANH, SIGMOID, SILU = range(len(ACTS))
# Acts whose second derivative is zero.
PIECEWISE_LINEAR = (LINEAR, RELU, LRELU)


def unsupported_options(negative_slope: float = 0.0, gain: float = 1.0, **options: object) -> str | None:
    """Why kernels cannot run with these options: they read the slope of the act off the sign of its output."""
    if not (gain > 0 and math.isfinite(gain)):
        return f"it supports only a positive gain, not {gain}"
    if not (negative_slope >= 0 and math.isfinite(negative_slope)):
        return f"it supports only a negative_slope of at least 0, not {negative_slope}"
    return None


def _lean_unsupported_reason(*inputs: Tensor, **options: Any) -> str | None:
    if options.get("act", LRELU) not in PIECEWISE_LINEAR:
        return f"the second derivative of {ACTS[options['act']]} is not zero"
    return unsupported_options(**options)


def _cpp_not_preferred(*inputs: Tensor, act: int = LRELU, **_: Any) -> str | None:
    """Not for lrelu of few elements, which `_small` runs."""
    small = inputs and act == LRELU and inputs[0].numel() <= SMALL_NUMEL and inputs[0].dtype == torch.float32
    return f"PyTorch's own ops are faster up to {SMALL_NUMEL} elements" if small and not in_forward_mode() else None


def _native_unsupported_reason(*inputs: Tensor, act: int = LRELU, **_: Any) -> str | None:
    if act != LRELU or in_forward_mode():
        return "it supports lrelu in reverse mode"
    plain = all(is_plain_tensor(x) and x.is_cpu and x.dtype == torch.float32 for x in inputs)
    return None if plain else "it supports float32 on a CPU"


def _native_not_preferred(*inputs: Tensor, **_: Any) -> str | None:
    return None if inputs and inputs[0].numel() <= SMALL_NUMEL else f"kernels are faster beyond {SMALL_NUMEL} elements"


def classify(x: Tensor, *inputs: Tensor, act: int = LRELU, **_: Any) -> tuple[object, ...]:
    """The class of a call: the act decides what its derivatives take."""
    return x.device, x.dtype, x.is_contiguous(), size_class(x.numel()), (act,)


_KERNELS = kernel_implementations("bias_act", unsupported_options)
OP = Op(
    "bias_act",
    {
        **_KERNELS,
        "cpp": replace(_KERNELS["cpp"], not_preferred_reason=_cpp_not_preferred),
        "native": replace(
            NATIVE, unsupported_reason=_native_unsupported_reason, not_preferred_reason=_native_not_preferred
        ),
        "lean": replace(LEAN, unsupported_reason=_lean_unsupported_reason),
    },
    supports_forward_mode=True,
    classify=classify,
    variant=("act",),
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

    First and second derivatives in `x` and `bias`. Of linear, relu and lrelu every order is right, and in second order
    `x` and `bias` get None, not zeros: `autograd.grad` needs `allow_unused=True`. Of the other acts a third derivative
    raises, except with backend="torch".

    Args:
        x: [N, C, ...], any floating-point dtype.
        bias: [C], dtype of `x` or float32; or None.
        act: "linear", "relu", "lrelu", "tanh", "sigmoid" or "silu".
        negative_slope: of lrelu.
        gain: factor of the result; kernels support positive ones.
        backend: as in `fastgan.ops.use_backend`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        TypeError: a dtype that does not fit, or a `negative_slope` or `gain` that is not a number (a tensor is not one:
            it would get no gradient).
        ValueError: shapes or devices that do not fit, or an unknown `act`.
    """
    if negative_slope.__class__ is not float or gain.__class__ is not float:
        negative_slope, gain = require_number("negative_slope", negative_slope), require_number("gain", gain)
    if act == "lrelu" and _is_small(x, bias) and OP.allows_fast_path(backend, x, known=(x.shape, x.is_contiguous())):
        differentiated = x.requires_grad or (bias is not None and bias.requires_grad)
        small = _small if differentiated and torch.is_grad_enabled() else reference
        return small(x, bias, LRELU, negative_slope, gain)
    if foreign(x, bias) and not in_transform():
        return fall_through(OP, bias_act, _plain, (x, bias), act, negative_slope, gain, backend=backend)
    code = require_bias_and_act(x, bias, act)
    options = {"act": code, "negative_slope": negative_slope, "gain": gain}
    name = OP.choose(backend, *((x,) if bias is None else (x, bias)), **options)
    if name == "native" and tracked(x, bias):
        return _small(tagged(x, "native"), bias, code, negative_slope, gain)
    plain = name in ("torch", "native") or (name == "lean" and in_transform())
    if plain or (in_forward_mode() and code not in PIECEWISE_LINEAR):
        return reference(x, bias, code, negative_slope, gain)
    kernels = PYTORCH_KERNELS if name == "lean" else kernel_functions("bias_act", name)
    settings = BiasActSettings(kernels, code, negative_slope, gain)
    x, bias = dense(x), None if bias is None else bias.contiguous()
    if not tracked(x, bias):
        return kernels.bias_act_forward(x, bias, *settings[1:])
    function = _BiasActForwardMode if in_forward_mode() else _BiasAct
    return function.apply(non_leaf(x), None if bias is None else non_leaf(bias), settings)[0]


def require_bias_and_act(x: Tensor, bias: Tensor | None, act: str) -> int:
    """Raise unless the arguments fit; returns the index of `act`."""
    require_feature_map(x)
    if act not in ACTS:
        raise ValueError(f"act must be {', '.join(ACTS)}, got {act!r}")
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias must be {x.dtype}, as x, or torch.float32, got {bias.dtype}")
        if bias.shape != x.shape[1:2]:
            raise ValueError(f"bias must be [{x.shape[1]}], one for each channel of x, got shape {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on {x.device}, as x, got {bias.device}")
    return ACTS.index(act)


def _plain(x: Tensor, bias: Tensor | None, act: str, negative_slope: float, gain: float) -> Tensor:
    return reference(x, bias, require_bias_and_act(x, bias, act), negative_slope, gain)


def with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias along dimension 1, in x's dtype."""
    if bias is None:
        return x
    if bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    dims = x.ndim
    if dims == 2:
        return x + bias
    return x + (bias.view(-1, 1, 1) if dims == 4 else bias.view(-1, *[1] * (dims - 2)))


def reference(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    """Plain PyTorch, differentiable to any order."""
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
    return y.clone() if y is x else y  # callers may change the result in place


with torch.inference_mode(False):  # an inference tensor could not be used in training
    _ONE = torch.ones((), device="cpu")


def _is_small(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `_small` can run this call; False also for arguments that do not fit.

    It runs in every eager call of lrelu; in the smallest ones each function that is called here adds measurable time.
    """
    if x.__class__ is not Tensor and x.__class__ is not Parameter:
        return False
    if x.dtype is not torch.float32 or x.numel() > SMALL_NUMEL or not x.is_cpu or x.ndim < 2:
        return False
    if bias is None:
        return True
    if bias.__class__ is not Tensor and bias.__class__ is not Parameter and not isinstance(bias, Tensor):
        return False
    return bias.dtype is torch.float32 and bias.is_cpu and bias.ndim == 1 and bias.numel() == x.size(1)


def _small(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    """lrelu as a product with its slope, a constant: PyTorch's double backward of that sends no zeros back."""
    y = with_bias(x, bias)
    # The gradient of lrelu for a cotangent of 1 is its slope.
    y = y * leaky_relu_backward(_ONE, y.detach(), negative_slope, False)
    return y if gain == 1 else y * gain


class BiasActSettings(NamedTuple):
    """Arguments of the Functions besides tensors; `kernels` has the functions of `PYTORCH_KERNELS`."""

    kernels: Any
    act: int
    negative_slope: float
    gain: float


def _silu_bias(bias: Tensor | None, settings: BiasActSettings) -> Tensor | None:
    """The bias for a backward kernel: only silu needs it, as the other acts read x + bias off their output."""
    return bias if settings.act == SILU else None


class _BiasAct(Function):
    """Returns y and a placeholder of x, or None where x itself is kept or the second derivative is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        y = settings.kernels.bias_act_forward(x, bias, *settings[1:])
        origin = placeholder(x) if settings.act in (TANH, SIGMOID) else None
        if settings.act == SILU:
            ctx.save_for_backward(form_tag(), None, x, bias)
        elif settings.act == LRELU and bias is None and not in_forward_mode():
            # The slope can be read off x as well, and as with torch's leaky_relu y may then be changed in place.
            ctx.save_for_backward(form_tag(), x, None, None)
        else:
            ctx.save_for_backward(form_tag(), None if settings.act == LINEAR else kept(y), origin, bias)
        ctx.settings = settings
        return y, origin

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dorigin: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return dorigin, None, None
        _, y, origin, bias = ctx.saved_tensors
        ref = origin if y is None else y
        dx, db = _backward(
            dense(dy) if ref is None else dense_like(dy, ref),
            origin,
            None if ctx.settings.act in PIECEWISE_LINEAR else bias,
            ref,
            ctx.settings,
            bias is not None and needs_gradient(ctx, 1),
        )
        return add_gradients(dx, dorigin), None if db is None else db.to(bias.dtype), None


class _BiasActForwardMode(_BiasAct):
    """With a forward-mode rule, for piecewise linear acts. torch.compile supports no Function with a `jvp`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, settings: BiasActSettings) -> tuple[Tensor, Tensor | None]:
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
        t = dense(t) if ref is None else dense_like(t, ref)
        return _run_backward(t, None, None, ref, ctx.settings, False)[0], None


def _backward(
    dy: Tensor,
    origin: Tensor | None,
    bias: Tensor | None,
    ref: Tensor | None,
    settings: BiasActSettings,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """`_run_backward`; in plain PyTorch in forward mode, where `dy` may have a tangent."""
    if in_forward_mode() and (settings.act in PIECEWISE_LINEAR or not torch.is_grad_enabled()):
        dx, db = backward(dy, ref, _silu_bias(bias, settings), *settings[1:], need_bias)
        return dx, db if need_bias else None
    return _run_backward(dy, origin, bias, ref, settings, need_bias)


def _run_backward(
    dy: Tensor,
    origin: Tensor | None,
    bias: Tensor | None,
    ref: Tensor | None,
    settings: BiasActSettings,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """`BiasActBackward`; where autograd is off the kernel alone, without the overhead of a Function."""
    if torch.is_grad_enabled():
        ref = None if ref is None else ref.detach()
        return BiasActBackward.apply(non_leaf(dy), origin, bias, ref, settings, need_bias)
    dx, db = settings.kernels.bias_act_backward(dy, ref, _silu_bias(bias, settings), *settings[1:], need_bias)
    return dx, db if need_bias else None


class BiasActBackward(Function):
    """Returns dx and db or None. `origin`, x or its placeholder, represents x in the graph; `ref` has the values."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        origin: Tensor | None,
        bias: Tensor | None,
        ref: Tensor | None,
        settings: BiasActSettings,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        dx, db = settings.kernels.bias_act_backward(dy, ref, _silu_bias(bias, settings), *settings[1:], need_bias)
        piecewise = settings.act in PIECEWISE_LINEAR
        ctx.save_for_backward(*(None, None, None) if piecewise else (dy, origin, bias), ref)
        ctx.settings, ctx.shape, ctx.dtype = settings, dy.shape, dy.dtype
        return dx, db if need_bias else None

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, ub: Tensor | None) -> tuple[Any, ...]:
        none = (None,) * 6
        if u is None and ub is None:
            return none
        dy, origin, bias, ref = ctx.saved_tensors
        settings, shape = ctx.settings, ctx.shape
        if ub is not None:  # db is a sum of dx, so its cotangent is one of every element of dx
            ub = ub.to(ctx.dtype).view(-1, *[1] * (len(shape) - 2))
            u = ub.expand(shape) if u is None else u + ub
        assert u is not None
        u = dense(u) if ref is None else dense_like(u, ref)
        if settings.act in PIECEWISE_LINEAR:
            # Linear in dy and self-adjoint; the second derivative in x is zero.
            return _backward(u, None, None, ref, settings, False)[0], *none[1:]
        need_bias = bias is not None and needs_gradient(ctx, 2)
        if not (need_bias or needs_gradient(ctx, 1)):
            # As a function of dy alone it is linear and self-adjoint for these acts too.
            return _backward(u, origin, bias, ref, settings, False)[0], *none[1:]

        def kernel(u: Tensor, dy: Tensor, origin: Tensor, bias: Tensor | None, ref: Tensor) -> tuple[Any, ...]:
            bias = _silu_bias(bias, settings)
            return settings.kernels.bias_act_second_backward(u, dy, ref, bias, *settings[1:], need_bias)

        gdy, gx, gb = SecondBackward.apply("bias_act", kernel, non_leaf(u), dy, origin, bias, ref)
        gb = gb if need_bias else None
        return gdy, gx, None if gb is None else gb.to(bias.dtype), *none[3:]


# The kernels' functions in plain PyTorch: the specification of what a kernel computes, and the `lean` implementation.


def forward(x: Tensor, bias: Tensor | None, act: int, negative_slope: float, gain: float) -> Tensor:
    """Returns y, like x: [N, C, ...]; bias: [C] in x's dtype or float32, or None."""
    return reference(x, bias, act, negative_slope, gain)


def backward(
    dy: Tensor, ref: Tensor | None, bias: Tensor | None, act: int, negative_slope: float, gain: float, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns dx = dy act'(x + bias) gain, like dy, and db, its sum over all but dimension 1: float32 [C].

    `ref` is y for relu, lrelu, tanh and sigmoid, x for silu, None for linear; `bias` is None except for silu. db has
    shape [0] unless `need_bias`.
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
    return dx, bias_sum(dx, need_bias)


def second_backward(
    u: Tensor,
    dy: Tensor,
    ref: Tensor,
    bias: Tensor | None,
    act: int,
    negative_slope: float,
    gain: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gdy = u act' gain, gx = u dy act'' gain and gb, the sum of gx as db in `backward`; u: like dy.

    For tanh, sigmoid and silu. The second backward of the other acts is `backward` with u for dy.
    """
    first, second = _slope(ref, bias, act, gain)
    gx = (u * gain * dy * second).to(dy.dtype)
    return (u * gain * first).to(dy.dtype), gx, bias_sum(gx, need_bias)


def _slope(ref: Tensor, bias: Tensor | None, act: int, gain: float) -> tuple[Tensor, Tensor]:
    """act' and act'' of tanh, sigmoid and silu, float32 at least."""
    ref = ref.to(accumulation_dtype(ref))
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


def bias_sum(dx: Tensor, need_bias: bool) -> Tensor:
    """Sum over all but dimension 1, float32 at least; empty unless needed."""
    dtype = accumulation_dtype(dx)
    if not need_bias:
        return dx.new_empty(0, dtype=dtype)
    return dx.sum([0, *range(2, dx.ndim)], dtype=dtype)


PYTORCH_KERNELS = SimpleNamespace(
    bias_act_forward=forward, bias_act_backward=backward, bias_act_second_backward=second_backward
)
