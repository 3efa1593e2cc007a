"""The piecewise linear activations of `torch.nn.functional`, in place too, whose second derivatives send no zeros.

They run in PyTorch's kernels under the Functions of `fastgan.ops.piecewise`. leaky_relu has more: large tensors run in
the kernels of `bias_act`, and small ones, for which Python's part would take longer than the arithmetic, as a product
with the slope, which is a constant to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops import piecewise
from fastgan.ops.arguments import SMALL_NUMEL
from fastgan.ops.autograd import autocast, autocast_enabled, kept, tracked
from fastgan.ops.bias_act import OP as BIAS_ACT
from fastgan.ops.bias_act import bias_act
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import LEAN, Op
from fastgan.ops.fallthrough import fall_through, foreign
from fastgan.ops.piecewise import Rule

_aten = torch.ops.aten


def _op(name: str) -> Op:
    return Op(name, {"lean": LEAN})


RELU, LEAKY_RELU, RELU6, HARDTANH = _op("relu"), _op("leaky_relu"), _op("relu6"), _op("hardtanh")
THRESHOLD, PRELU, ABS = _op("threshold"), _op("prelu"), _op("abs")


def _elementwise(forward: Any, in_place: Any, slope: Any) -> Rule:
    """A rule whose map multiplies by a slope and is its own adjoint; in place the slope is read off the result."""

    def keep_input(x: Tensor, options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return forward(x, *options), (x,)

    def keep_result(x: Tensor, options: Any) -> tuple[Tensor, ...]:
        in_place(x, *options)
        # An alias: the returned tensor itself would be a cycle, and vmap and Dynamo do not support it.
        return (kept(x.detach()),)

    def multiply(g: Tensor, options: Any, ref: Tensor) -> Tensor:
        return slope(g, ref, *options)

    return Rule(keep_input, multiply, multiply, keep_result if in_place is not None else None)


def _relu_and_result(x: Tensor, options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    # As torch's, which keeps the result: the input may be changed in place. See `kept` for the result.
    y = torch.relu(x)
    return y, (kept(y),)


_RELU = _elementwise(torch.relu, torch.relu_, lambda g, ref: _aten.threshold_backward(g, ref, 0))._replace(
    forward=_relu_and_result
)
_LEAKY_RELU = _elementwise(
    F.leaky_relu,
    F.leaky_relu_,
    lambda g, ref, slope: _aten.leaky_relu_backward(g, ref, slope, False),
)
_HARDTANH = _elementwise(
    F.hardtanh,
    F.hardtanh_,
    lambda g, ref, low, high: _aten.hardtanh_backward(g, ref, low, high),
)
_ABS = _elementwise(torch.abs, None, lambda g, ref: g * ref.sgn())


def _threshold_slope(g: Tensor, ref: Tensor, options: Any) -> Tensor:
    return _aten.threshold_backward(g, ref, options[0])


def _threshold_in_place(x: Tensor, options: Any) -> tuple[Tensor, ...]:
    # Not read off the result, as the value that it gets may be above the threshold.
    slope = _threshold_slope(torch.ones_like(x), x, options)
    x.copy_(F.threshold(x, *options))
    return (slope,)


_THRESHOLD = Rule(
    lambda x, options: (F.threshold(x, *options), (x,)),
    lambda t, options, ref: _threshold_slope(t, ref, options),
    lambda g, options, ref: _threshold_slope(g, ref, options),
)
_THRESHOLD_IN_PLACE = Rule(
    _THRESHOLD.forward,
    lambda t, options, slope: t * slope,
    lambda g, options, slope: g * slope,
    _threshold_in_place,
)


def _runs_lean(op: Op, backend: str | None, x: Tensor) -> bool:
    return op.choose(backend, x) == "lean" and tracked(x)


def _has_kernels(x: Tensor) -> bool:
    """Whether `bias_act` runs the call, in the implementation that is its default: no request of it is one of these."""
    return x.ndim > 1 and BIAS_ACT.requested(None) is None


def relu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """`torch.nn.functional.relu`, whose second derivative, which is zero, sends nothing backward.

    Args:
        input: any shape; what is not a plain tensor of a floating-point dtype runs in torch's own function.
        inplace: change `input` itself and return it.
        backend: "lean" or "torch".
    """
    if foreign(input):
        return fall_through(RELU, relu, F.relu, (input,), inplace, backend=backend)
    if not _runs_lean(RELU, backend, input):
        return F.relu(input, inplace)
    return (piecewise.apply_in_place if inplace else piecewise.apply)(input, _RELU)


def leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """`torch.nn.functional.leaky_relu`, whose second derivative, which is zero, sends nothing backward.

    Arguments as in `relu`; `negative_slope` may have any sign, in place only a positive one or 0, as in torch.
    """
    if foreign(input):
        return fall_through(LEAKY_RELU, leaky_relu, F.leaky_relu, (input,), negative_slope, inplace, backend=backend)
    if not _runs_lean(LEAKY_RELU, backend, input) or isinstance(negative_slope, Tensor):
        return F.leaky_relu(input, negative_slope, inplace)
    if inplace:
        if negative_slope < 0:
            return F.leaky_relu(input, negative_slope, True)
        if input.is_cpu and input.numel() <= SMALL_NUMEL and LEAKY_RELU.allows_fast_path(backend):
            ones = input.new_ones(())
            return input.mul_(_aten.leaky_relu_backward(ones, input.detach(), negative_slope, False))
        return piecewise.apply_in_place(input, _LEAKY_RELU, (negative_slope,))
    if negative_slope >= 0 and _has_kernels(input):
        return bias_act(input, None, "lrelu", negative_slope)
    return piecewise.apply(input, _LEAKY_RELU, (negative_slope,))


def hardtanh(
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.hardtanh`, whose second derivative, which is zero, sends nothing backward.

    Arguments as in torch, and `backend` as in `relu`.
    """
    if foreign(input):
        return fall_through(HARDTANH, hardtanh, F.hardtanh, (input,), min_val, max_val, inplace, backend=backend)
    if not _runs_lean(HARDTANH, backend, input) or not min_val <= max_val:
        return F.hardtanh(input, min_val, max_val, inplace)
    run = piecewise.apply_in_place if inplace else piecewise.apply
    return run(input, _HARDTANH, (min_val, max_val))


def relu6(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """`torch.nn.functional.relu6`, whose second derivative, which is zero, sends nothing backward; see `relu`."""
    if foreign(input):
        return fall_through(RELU6, relu6, F.relu6, (input,), inplace, backend=backend)
    if not _runs_lean(RELU6, backend, input):
        return F.relu6(input, inplace)
    run = piecewise.apply_in_place if inplace else piecewise.apply
    return run(input, _HARDTANH, (0.0, 6.0))


def threshold(
    input: Tensor, threshold: float, value: float, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """`torch.nn.functional.threshold`, whose second derivative, which is zero, sends nothing backward; see `relu`."""
    if foreign(input):
        options = threshold, value, inplace
        return fall_through(THRESHOLD, _threshold, F.threshold, (input,), *options, backend=backend)
    if not _runs_lean(THRESHOLD, backend, input):
        return F.threshold(input, threshold, value, inplace)
    if inplace:
        return piecewise.apply_in_place(input, _THRESHOLD_IN_PLACE, (threshold, value))
    return piecewise.apply(input, _THRESHOLD, (threshold, value))


_threshold = threshold  # its argument has its name


def abs(input: Tensor, *, backend: str | None = None) -> Tensor:
    """`torch.abs`, whose second derivative, which is zero, sends nothing backward; see `relu`."""
    if foreign(input):
        return fall_through(ABS, abs, torch.abs, (input,), backend=backend)
    if not _runs_lean(ABS, backend, input):
        return torch.abs(input)
    return piecewise.apply(input, _ABS)


def prelu(input: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """`torch.nn.functional.prelu`, whose second derivative in `input`, which is zero, sends nothing backward.

    That in `input` and `weight` is not zero, and right to any order.

    Args:
        input: [N, C, ...], or any shape with one weight.
        weight: [C] or [1], the slope where the input is negative.
        backend: "lean" or "torch".
    """
    if foreign(input, weight):
        return fall_through(PRELU, prelu, F.prelu, (input, weight), backend=backend)
    fits = weight.ndim <= 1 and (weight.numel() == 1 or (input.ndim > 1 and weight.numel() == input.shape[1]))
    lean = PRELU.choose(backend, input) == "lean" and tracked(input, weight)
    if not lean or not fits or (input.dtype != weight.dtype and not autocast_enabled(input)):
        return F.prelu(input, weight)
    input, weight = autocast(input, weight)
    slope = weight.view(-1, *[1] * (input.ndim - 2)) if weight.numel() > 1 else weight.reshape(())
    return torch.where(input > 0, input, slope * input)
