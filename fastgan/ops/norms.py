"""Layer, group and instance norm with torch's signatures, and a second backward in one sweep over memory.

All of them normalize rows: a row is a sample's channel (instance norm), group of channels, or feature vector. With
y = r (x - <x>) and r = (<(x - <x>)^2> + eps)^(-1/2), where <.> is the mean over a row, and g = w dy, what reaches y
through an affine layer behind it,

    a = <g y>    dx = r (g - <g> - y a)                            first backward
    b = <u y>    p  = r (u - <u> - y b)                            second backward, u being the cotangent of dx: of g,
    gx = -r^2 (a (u - <u>) + b (g - <g>) + y (<(u - <u>) (g - <g>)> - 3 a b))    of x,
    gdy = w p    gw = sum dy p                                     and so of dy and w

The forward and the first backward are torch's own fused functions; instance norm is a group norm with a group for each
channel. Torch's second backward is composed of some thirty elementwise operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import SMALL_NUMEL, accumulation_dtype
from fastgan.ops.autograd import (
    SecondBackward,
    add_gradients,
    autocast_enabled,
    form_tag,
    needs_gradient,
    non_leaf,
    tracked,
)
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import Implementation, Op, by_size
from fastgan.ops.dispatch.torch_private import constant_when_compiled, dispatcher_has_kernel
from fastgan.ops.fallthrough import fall_through, foreign

_FORWARD = torch.ops.aten.native_group_norm.default
_BACKWARD = torch.ops.aten.native_group_norm_backward.default
_LAYER_FORWARD = torch.ops.aten.native_layer_norm.default
_LAYER_BACKWARD = torch.ops.aten.native_layer_norm_backward.default


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.layer_norm`: normalizes over the last dimensions (Ba et al. 2016, equation 3).

    Args:
        input: [..., *normalized_shape].
        normalized_shape: sizes of the dimensions that are normalized over.
        weight, bias: `normalized_shape`, or None.
        eps: added to the variance.
        backend: None, "torch", "fused" or "cpp"; see `fastgan.ops.backends`.

    Returns:
        As torch's. First and second derivatives; a third raises, except with backend="torch".
    """
    shape = tuple(normalized_shape) if not isinstance(normalized_shape, int) else (normalized_shape,)
    options = (shape, weight, bias, eps)
    if foreign(input, weight, bias):
        return fall_through(LAYER_NORM, layer_norm, F.layer_norm, (input,), *options, backend=backend)
    fits = 0 < len(shape) <= input.ndim and tuple(input.shape[input.ndim - len(shape) :]) == shape
    size = math.prod(shape) if fits and input.numel() and _have(shape, weight, bias) else 0
    name = _choose(LAYER_NORM, backend, input, weight, bias, size, shape=shape)
    if name == "torch":
        return F.layer_norm(input, shape, weight, bias, eps)
    settings = _Settings(name, input.numel() // size, size, eps, None, shape)
    return _Norm.apply(non_leaf(input), _given(weight), _given(bias), settings)[0]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.group_norm`: normalizes over groups of channels of a sample (Wu and He 2018, equation 1).

    Args:
        input: [N, C, ...].
        num_groups: divides C.
        weight, bias: [C], or None.
        eps, backend: as of `layer_norm`.

    Returns:
        As torch's. First and second derivatives; a third raises, except with backend="torch".
    """
    if foreign(input, weight, bias):
        options = (num_groups, weight, bias, eps)
        return fall_through(GROUP_NORM, group_norm, F.group_norm, (input,), *options, backend=backend)
    size = _group_size(input, num_groups, weight, bias)
    name = _choose(GROUP_NORM, backend, input, weight, bias, size, groups=num_groups)
    if name == "torch":
        return F.group_norm(input, num_groups, weight, bias, eps)
    settings = _Settings(name, input.shape[0] * num_groups, size, eps, num_groups, ())
    return _Norm.apply(non_leaf(input), _given(weight), _given(bias), settings)[0]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.instance_norm`: normalizes each channel of a sample (Ulyanov et al. 2016, equation 4).

    Running statistics, kept or used, are torch's own call.

    Args:
        input: [N, C, ...].
        running_mean, running_var, use_input_stats, momentum: as of torch's.
        weight, bias: [C], or None.
        eps, backend: as of `layer_norm`.

    Returns:
        As torch's. First and second derivatives; a third raises, except with backend="torch".
    """
    options = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if foreign(input, weight, bias):
        return fall_through(INSTANCE_NORM, instance_norm, F.instance_norm, (input,), *options, backend=backend)
    plain = running_mean is None and running_var is None and use_input_stats and input.ndim > 2
    size = _group_size(input, input.shape[1], weight, bias) if plain else 0
    name = _choose(INSTANCE_NORM, backend, input, weight, bias, size)
    if name == "torch":
        return F.instance_norm(input, *options)
    settings = _Settings(name, input.shape[0] * input.shape[1], size, eps, input.shape[1], ())
    return _Norm.apply(non_leaf(input), _given(weight), _given(bias), settings)[0]


def _given(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else non_leaf(parameter)


def _have(shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the parameters have this shape; a bias without a weight is left to torch."""
    if weight is None:
        return bias is None
    return tuple(weight.shape) == shape and (bias is None or tuple(bias.shape) == shape)


def _group_size(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> int:
    """Elements of a row of [N, C, ...]; 0 where torch's call raises, or normalizes a single element."""
    if x.ndim < 2 or groups.__class__ is not int or groups < 1 or x.shape[1] % groups or not x.numel():
        return 0
    size = x.numel() // x.shape[0] // groups
    return size if size > 1 and _have((x.shape[1],), weight, bias) else 0


def _choose(
    op: Op, backend: str | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, **options: object
) -> str:
    """Name of the implementation; torch's own call where there is no gradient, or where arguments do not fit."""
    if not tracked(x, weight, bias) or torch.compiler.is_compiling():
        return "torch"
    mixed = any(p is not None and p.dtype != x.dtype for p in (weight, bias))
    inputs = (x,) if weight is None else (x, weight)
    return op.choose(backend, *inputs, unusual=size == 0 or mixed or autocast_enabled(x), **options)


class _Settings(NamedTuple):
    """Arguments of the Functions besides tensors.

    Attributes:
        form: the implementation.
        rows, size: of what is normalized.
        eps: added to the variance.
        groups: of channels; None: layer norm.
        shape: that of layer norm.
    """

    form: str
    rows: int
    size: int
    eps: float
    groups: int | None
    shape: tuple[int, ...]

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.groups is None:
            return _LAYER_FORWARD(x, self.shape, weight, bias, self.eps)
        n, c = x.shape[:2]
        return _FORWARD(x, weight, bias, n, c, x.numel() // (n * c), self.groups, self.eps)

    def backward(self, dy: Tensor, x: Tensor, mean: Tensor, r: Tensor, weight: Tensor | None, mask: Any) -> Any:
        if self.groups is None:
            # Of the bias it reads the shape alone.
            return _LAYER_BACKWARD(dy, x, self.shape, mean, r, weight, weight, mask)
        n, c = x.shape[:2]
        return _BACKWARD(dy, x, mean, r, weight, n, c, x.numel() // (n * c), self.groups, mask)

    def of_channel(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A weight, so that it broadcasts over x."""
        return parameter if self.groups is None else parameter.view(-1, *[1] * (x.ndim - 2))

    def summed(self, x: Tensor) -> Tensor:
        """The sum of x over all elements that share a weight."""
        if self.groups is None:
            return x.sum(dim=tuple(range(x.ndim - len(self.shape)))) if x.ndim > len(self.shape) else x
        return x.sum(dim=(0, *range(2, x.ndim)))


class _Norm(Function):
    """Returns y, and the statistics of torch's function."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, mean, r = settings.forward(x.contiguous(), weight, bias)
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(form_tag(), x, weight, mean, r)
        ctx.settings = settings
        return y, mean, r

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 4
        _, x, weight, mean, r = ctx.saved_tensors
        mask = [needs_gradient(ctx, i) for i in range(3)]
        dx, dw, db = _NormBackward.apply(non_leaf(dy), x, weight, mean, r, mask, ctx.settings)
        return dx, dw, db, None


class _NormBackward(Function):
    """Returns dx, dw and db, or None where the mask says so."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor, mask: Any, settings: _Settings
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight)
        ctx.settings = settings
        found = settings.backward(dy.contiguous(), x.contiguous(), mean, r, weight, mask)
        return tuple(g if wanted else None for g, wanted in zip(found, mask, strict=True))

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, t: Tensor | None) -> tuple[Any, ...]:
        if u is None and v is None and t is None:
            return (None,) * 7
        dy, x, weight = ctx.saved_tensors
        needed = [needs_gradient(ctx, i) for i in range(3)]

        def kernel(
            u: Tensor | None, v: Tensor | None, t: Tensor | None, dy: Tensor, x: Tensor, weight: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            return _second_backward(ctx.settings, u, v, t, dy, x, weight, needed)

        return *SecondBackward.apply("a norm", kernel, u, v, t, dy, x, weight), None, None, None, None


def _second_backward(
    settings: _Settings,
    u: Tensor | None,
    v: Tensor | None,
    t: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """gdy, gx and gw for cotangents u, v and t of dx, dw and db; None for what is not needed."""
    gdy = gx = gw = None
    scale = None if weight is None else settings.of_channel(weight, x)
    if u is not None:
        g = dy if scale is None else dy * scale
        rows = (settings.rows, settings.size)
        p, gx = _KERNELS[settings.form](u.reshape(rows), g.reshape(rows), x.reshape(rows), settings.eps)
        p, gx = p.view(x.shape), gx.view(x.shape)
        gdy = p if scale is None else p * scale
        gw = settings.summed(dy * p) if weight is not None and needed[2] else None
    if v is not None:
        by_channel, wide = settings.of_channel(v, x), accumulation_dtype(x)
        normalized = x.reshape(settings.rows, settings.size).to(wide)
        r, y = _standardized(normalized, settings.eps)
        q = (by_channel * dy).reshape(normalized.shape).to(wide)
        of_q = r * (q - q.mean(1, keepdim=True) - y * (q * y).mean(1, keepdim=True))
        gx = add_gradients(gx, of_q.to(x.dtype).view(x.shape))
        gdy = add_gradients(gdy, by_channel * y.to(x.dtype).view(x.shape))
    if t is not None:
        by_channel = settings.of_channel(t, x).expand(x.shape)
        gdy = by_channel.contiguous() if gdy is None else gdy + by_channel
    return gdy if needed[0] else None, gx if needed[1] else None, gw


def _standardized(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    r = torch.rsqrt(variance + eps)
    return r, (rows - mean) * r


def fused(u: Tensor, g: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """p and gx, the cotangents of g and x, of rows [rows, size]; the specification of the kernel."""
    dtype, wide = x.dtype, accumulation_dtype(x)
    u, g = u.to(wide), g.to(wide)
    r, y = _standardized(x.to(wide), eps)
    u, g = u - u.mean(1, keepdim=True), g - g.mean(1, keepdim=True)
    a, b, s = ((one * other).mean(1, keepdim=True) for one, other in ((g, y), (u, y), (u, g)))
    gx = (-r * r) * (a * u + b * g + y * (s - 3 * a * b))
    return (r * (u - y * b)).to(dtype), gx.to(dtype)


def _cpp(u: Tensor, g: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ops.fastgan.normalize_second_backward(u.contiguous(), g.contiguous(), x.contiguous(), eps)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "fused": fused,
    "cpp": _cpp,
}


@constant_when_compiled
@cache
def _no_cpp() -> str | None:
    from fastgan.ops.dispatch import extension

    reason = extension.cpu()
    if reason is None and not dispatcher_has_kernel("fastgan::normalize_second_backward", "CPU"):
        reason = "the compiled library has no normalize_second_backward"
    if reason is None:
        torch.library.register_fake("fastgan::normalize_second_backward", _shapes)
    return reason


def _shapes(u: Tensor, g: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(g), torch.empty_like(x)


def _unsupported(*inputs: Tensor, unusual: bool = False, **_: object) -> str | None:
    return "torch has to judge the arguments, or to choose a dtype" if unusual else None


def _unsupported_by_cpp(*inputs: Tensor, unusual: bool = False, **_: object) -> str | None:
    for x in inputs:
        if not x.is_cpu:
            return f"it runs on cpu, not {x.device.type}"
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"it supports float32, bfloat16, not {x.dtype}"
    return _unsupported(unusual=unusual) or _no_cpp()


def _not_preferred(*inputs: Tensor, **_: object) -> str | None:
    if inputs and not inputs[0].is_cpu:
        return "not yet measured on this kind of device"
    if inputs and inputs[0].numel() < SMALL_NUMEL:
        return f"PyTorch is faster below {SMALL_NUMEL} elements in first order"
    if inputs and not inputs[0].is_contiguous():
        return "torch's own norms have a fast path for channels_last"
    return None


def _classify(x: Tensor, *_: Tensor, unusual: bool = False, **options: object) -> tuple[object, ...] | None:
    """The class of a call, by its size; none where torch has to judge the arguments."""
    return None if unusual or x.ndim < 2 else by_size(x)


def _op(name: str) -> Op:
    note = "torch's first order; second order in "
    return Op(
        name,
        {
            "cpp": Implementation(_unsupported_by_cpp, _not_preferred, note=f"{note}C++", device="cpu"),
            "fused": Implementation(_unsupported, _not_preferred, note=f"{note}PyTorch"),
        },
        classify=_classify,
    )


LAYER_NORM, GROUP_NORM, INSTANCE_NORM = map(_op, ("layer_norm", "group_norm", "instance_norm"))
