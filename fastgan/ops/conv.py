"""Convolutions and the linear layer, differentiable to any order with as few products as possible.

A convolution is linear in its input and in its weight, so its derivatives of every order consist of three maps: the
convolution itself, the gradient of its input and the gradient of its weight (`fastgan.ops.conv_products`). Each is an
autograd Function whose derivatives are the other two, computed only where the engine needs them. PyTorch's own double
backward computes the weight's gradient as a convolution with batch and channels exchanged, which is slower, and that of
averaging sends zeros back through every layer before it (docs/penalties.md).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import is_channels_last
from fastgan.ops.autograd import autocast, autocast_enabled, needs_gradient, non_leaf, tracked
from fastgan.ops.conv_products import (
    CONV_VARIANT,
    CPP,
    WINOGRAD,
    Dispatch,
    Geometry,
    classify,
    convolution,
    dispatch_of,
    forward,
    multiplied_in_float32,
)
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import LEAN, Op, in_transform
from fastgan.ops.dispatch.torch_private import in_forward_mode
from fastgan.ops.fallthrough import fall_through, foreign

Ints = int | tuple[int, ...]

CONV2D = Op("conv2d", {"winograd": WINOGRAD, "cpp": CPP, "lean": LEAN}, True, classify, CONV_VARIANT)
CONV_TRANSPOSE2D = Op("conv_transpose2d", {"lean": LEAN}, True, classify, CONV_VARIANT)
Op("linear")


def _pair(name: str, value: Any) -> tuple[int, ...]:
    if type(value) is int:
        return value, value
    given = tuple(value) if isinstance(value, Sequence) else (value,)
    try:
        values = () if bool in map(type, given) else tuple(map(operator.index, given))
    except TypeError:
        values = ()
    if len(values) not in (1, 2):
        error = ValueError if values else TypeError
        raise error(f"{name} must be an integer or a pair of integers, got {value!r}")
    return values * 2 if len(values) == 1 else values


def require_conv_arguments(x: Tensor, w: Tensor, bias: Tensor | None, groups: int, transposed: bool) -> None:
    """Raise for arguments that would fail inside a kernel, with a message of another op."""
    for name, tensor in (("weight", w), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and not autocast_enabled(x):
            raise TypeError(f"{name} must be {x.dtype}, as input, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as input, got {tensor.device}")
    if type(groups) is bool:
        raise TypeError(f"groups must be an integer, got {groups}")
    if x.ndim not in (3, 4):
        raise ValueError(f"input must be [N, C, H, W] or [C, H, W], got {x.ndim} dimensions")
    if groups < 1 or x.shape[-3] % groups:
        raise ValueError(f"groups must be a divisor of the {x.shape[-3]} channels of input, got {groups}")
    channels = x.shape[-3] if transposed else x.shape[-3] // groups
    if w.ndim != 4 or w.shape[0 if transposed else 1] != channels or w.shape[0] % groups:
        form = f"[{channels}, O/groups, kH, kW]" if transposed else f"[O, {channels}, kH, kW], O divisible by groups"
        raise ValueError(f"weight must be {form}, got shape {tuple(w.shape)}")
    outputs = w.shape[1] * groups if transposed else w.shape[0]
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got shape {tuple(bias.shape)}")


def _require_geometry(geometry: Geometry, x: Tensor, w: Tensor) -> None:
    """Raise for a geometry that PyTorch's kernels would reject without naming the argument."""
    if torch.compiler.is_compiling():
        return
    stride, padding, dilation, transposed, output_padding, _ = geometry
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if values[0] < least or values[1] < least:
            raise ValueError(f"{name} must be at least {least}, got {values}")
    for i in range(2):
        if transposed:
            if not 0 <= output_padding[i] < max(stride[i], dilation[i]):
                limit = f"below stride {stride} or dilation {dilation}"
                raise ValueError(f"output_padding must be at least 0 and {limit}, got {output_padding}")
            reach = dilation[i] * (w.shape[2 + i] - 1) + output_padding[i]
            if (x.shape[i - 2] - 1) * stride[i] + reach < 2 * padding[i]:
                raise ValueError(f"padding must leave an output of at least one pixel, got {padding}")
        elif dilation[i] * (w.shape[2 + i] - 1) >= x.shape[i - 2] + 2 * padding[i]:
            padded = tuple(s + 2 * p for s, p in zip(x.shape[-2:], padding, strict=True))
            raise ValueError(f"weight must fit into the padded image of size {padded}, got shape {tuple(w.shape)}")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d`, differentiable to any order with as few convolutions as possible.

    The gradient of the input does not depend on the bias: from a penalty on it the bias gets None, not zeros, and
    `autograd.grad` needs `allow_unused=True`.

    Args:
        input: [N, I, H, W] or [I, H, W]. The tensors have one floating-point dtype, except under autocast.
        weight: [O, I / groups, kH, kW].
        bias: [O] or None.
        stride: as in torch, like `dilation` and `groups`.
        padding: as in torch, or "valid" or, with stride 1, "same".
        backend: on CPUs with AVX-512 the defaults are "winograd" for 3x3 kernels of many channels in channels_last,
            where a value that is not finite also spoils the results beside it, and "cpp" for few channels; "lean" is
            PyTorch's kernels, "torch" PyTorch's own function.

    Returns:
        [N, O, H', W'] or [O, H', W'].

    Raises:
        TypeError: a dtype that differs from the input's, or a geometry that is not of integers.
        ValueError: shapes, devices or a geometry that do not fit.
    """
    if foreign(input, weight, bias):
        options = (stride, padding, dilation, groups)
        return fall_through(CONV2D, conv2d, F.conv2d, (input, weight, bias), *options, backend=backend)
    require_conv_arguments(input, weight, bias, groups, transposed=False)
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    paddings, extra = _paddings(padding, strides, dilations, weight)
    geometry = Geometry(strides, paddings, dilations, False, (0, 0), groups)
    _require_geometry(geometry, input, weight)
    input, weight, bias = autocast(input, weight, bias)
    if any(extra) and not in_transform():  # an odd total pads one more to the right and the bottom, as in torch
        input, padding = F.pad(input, (0, extra[1], 0, extra[0])), paddings
    batch = input[None] if input.ndim == 3 else input
    name = CONV2D.choose(backend, batch, weight, geometry=geometry)
    if name == "torch" or torch.compiler.is_compiling():
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    as_measured = CONV2D.requested(backend) is not None
    if name == "cpp" and not as_measured and is_channels_last(batch):
        as_measured = CONV2D.decision((batch, weight), {"geometry": geometry}) is not None
    dispatch = dispatch_of(name, as_measured, batch, geometry)
    if tracked(input, weight, bias):
        y = convolution(batch, weight, bias, dispatch)
    elif dispatch.cpp_forward or dispatch.winograd or multiplied_in_float32(batch):
        y = forward(batch, weight, bias, dispatch)
    else:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return y[0] if input.ndim == 3 else y


def _paddings(
    padding: Ints | str, strides: tuple[int, ...], dilations: tuple[int, ...], weight: Tensor
) -> tuple[tuple[int, ...], list[int]]:
    """Rows and columns that are added on each side, and those that an odd total adds at the end alone."""
    if not isinstance(padding, str):
        return _pair("padding", padding), [0, 0]
    total = _named_padding(padding, strides, dilations, weight)
    return tuple(t // 2 for t in total), [t % 2 for t in total]


def _named_padding(name: str, strides: tuple[int, ...], dilations: tuple[int, ...], weight: Tensor) -> list[int]:
    """Rows and columns that are added in all, for padding "valid" or "same"."""
    if name not in ("valid", "same"):
        raise ValueError(f"padding must be numbers, 'valid' or 'same', got {name!r}")
    if name == "valid":
        return [0, 0]
    if strides != (1, 1):
        raise ValueError(f"stride must be 1 with padding 'same', got {strides}")
    return [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`, differentiable to any order with as few convolutions as possible.

    Arguments as in torch, with weight [I, O / groups, kH, kW]; dtypes, `backend`, errors and the gradient of a bias as
    in `conv2d`.
    """
    if foreign(input, weight, bias):
        options = (stride, padding, output_padding, groups, dilation)
        plain, tensors = F.conv_transpose2d, (input, weight, bias)
        return fall_through(CONV_TRANSPOSE2D, conv_transpose2d, plain, tensors, *options, backend=backend)
    require_conv_arguments(input, weight, bias, groups, transposed=True)
    geometry = Geometry(
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        True,
        _pair("output_padding", output_padding),
        groups,
    )
    _require_geometry(geometry, input, weight)
    input, weight, bias = autocast(input, weight, bias)
    name = CONV_TRANSPOSE2D.choose(backend, input, weight, geometry=geometry)
    lean = tracked(input, weight, bias) or multiplied_in_float32(input)
    if name == "torch" or torch.compiler.is_compiling() or not lean:
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    y = convolution(input[None] if input.ndim == 3 else input, weight, bias, Dispatch(geometry))
    return y[0] if input.ndim == 3 else y


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` itself, so that all layers of a critic can come from here.

    PyTorch's double backward of it needs no more than the four matrix products of a penalty with weight gradients.
    """
    # In forward mode PyTorch gives a weight without a tangent a zero one, whose derivative sends zeros backward.
    if foreign(input, weight, bias):
        return fall_through("linear", linear, F.linear, (input, weight, bias))
    if in_transform() or not in_forward_mode():
        return F.linear(input, weight, bias)
    return _Linear.apply(*(None if t is None else non_leaf(t) for t in autocast(input, weight, bias)))


class _Linear(Function):
    """PyTorch's own products, each of which sends no zeros backward in reverse mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)
        return F.linear(x, w, bias)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tbias: Tensor | None) -> Tensor:
        x, w = ctx.saved_tensors
        parts = [F.linear(a, b) for a, b in ((tx, w), (x, tw)) if a is not None and b is not None]
        if tbias is not None:
            # Dense: torch before 2.15 takes this for a view, whose tangent must have the layout of its primal.
            parts.append(tbias.expand(*x.shape[:-1], -1).contiguous())
        return sum(parts[1:], parts[0])

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Tensor | None, ...]:
        if gy is None:
            return None, None, None
        x, w = ctx.saved_tensors
        rows = gy.reshape(-1, gy.shape[-1])
        gx = gy @ w if needs_gradient(ctx, 0) else None
        gw = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_gradient(ctx, 1) else None
        return gx, gw, rows.sum(0) if ctx.needs_input_grad[2] else None
