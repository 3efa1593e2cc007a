"""The three products that a convolution and its derivatives of every order are made of, and their autograd Functions.

Each runs in PyTorch's kernel or in ours (csrc/cpu/conv2d.cpp), which leaves the layout of contiguous tensors alone
where oneDNN changes it to blocks of 16 channels and back.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.autograd import asked, node_of
from fastgan.ops.backend import Implementation, forward_mode
from fastgan.ops.kernel_registry import dense, kernels, like

_convolution_backward = torch.ops.aten.convolution_backward.default


class Geometry(NamedTuple):
    """All that a convolution is besides its tensors, in the order in which ATen takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class Way(NamedTuple):
    """A geometry, and whether our kernels compute the convolution and the gradient of its input."""

    geometry: Geometry
    forward: bool = False
    gradient: bool = False


_CPP = kernels("conv2d")["cpp"]


def _able(*inputs: Tensor | None, geometry: Geometry | None = None, **_: object) -> str | None:
    for t in inputs:
        if t is not None and t.dtype != torch.float32:
            return f"it takes float32, not {str(t.dtype).removeprefix('torch.')}"
    if geometry is not None and len(inputs) > 1:
        x, w = inputs[:2]
        assert x is not None and w is not None
        if (geometry.stride, geometry.dilation, geometry.groups) != ((1, 1), (1, 1), 1):
            return "it takes stride 1, dilation 1 and one group"
        for size, padding, kernel in zip(x.shape[2:], geometry.padding, w.shape[2:], strict=True):
            if not 0 <= padding < kernel <= size + 2 * padding:
                return "it takes paddings below the kernel's size and no kernel larger than the image"
    return _CPP.unsupported_reason(*inputs) or _register_fakes()


def _worth(*inputs: Tensor | None, **_: object) -> str | None:
    """Crossovers measured on two cores with AVX-512 (docs/penalties.md)."""
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return None
    x, w = inputs[:2]
    assert x is not None and w is not None
    if forward_mode():
        return "in forward mode PyTorch hands on zeros that have no memory"
    if _instructions() != "avx512":
        return "without AVX-512 oneDNN's kernels are the default"
    if in_channels_last(x):
        few = x.shape[1] <= 4 and w.shape[2] > 1
        return None if few else "oneDNN's kernels take channels_last as it is"
    return None if w.shape[0] * w.shape[1] <= 2304 else "beyond 2304 pairs of channels oneDNN's kernels are faster"


@cache
def _instructions() -> str:
    return str(torch.ops.fastgan.cpu_instructions())


def in_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


CPP = Implementation(
    unsupported_reason=_able,
    not_preferred_reason=_worth,
    note="C++ kernels; PyTorch's for the weight's gradient",
    device="cpu",
)


def way_of(name: str, asked_for: bool, x: Tensor, geometry: Geometry) -> Way:
    """Which products our kernels compute, where the implementation `name` was chosen, or asked for by the caller."""
    cpp = name == "cpp"
    # With channels_last oneDNN's forward product of a first layer is the faster one.
    return Way(geometry, cpp and (asked_for or not in_channels_last(x)), cpp)


@cache
def _register_fakes() -> None:
    def result(x: Tensor, channels: int, w: Tensor, padding: tuple[int, int], sign: int) -> Tensor:
        sizes = [s + sign * (2 * p - k + 1) for s, p, k in zip(x.shape[2:], padding, w.shape[2:], strict=True)]
        last = torch.channels_last if in_channels_last(x) else torch.contiguous_format
        return torch.empty((x.shape[0], channels, *sizes), dtype=x.dtype, device=x.device, memory_format=last)

    @torch.library.register_fake("fastgan::conv2d_forward")
    def _(x: Tensor, w: Tensor, bias: Tensor | None, pad_h: int, pad_w: int) -> Tensor:
        return result(x, w.shape[0], w, (pad_h, pad_w), 1)

    @torch.library.register_fake("fastgan::conv2d_input_gradient")
    def _(gy: Tensor, w: Tensor, pad_h: int, pad_w: int) -> Tensor:
        return result(gy, w.shape[1], w, (pad_h, pad_w), -1)


def forward(x: Tensor, w: Tensor, bias: Tensor | None, how: Way) -> Tensor:
    if how.forward:
        return torch.ops.fastgan.conv2d_forward.default(dense(x), w, bias, *how.geometry.padding)
    return torch.convolution(x, w, bias, *how.geometry)


def input_gradient(gy: Tensor, w: Tensor, x: Tensor, how: Way) -> Tensor:
    if how.gradient:
        return torch.ops.fastgan.conv2d_input_gradient.default(like(gy, x), w, *how.geometry.padding)
    return _convolution_backward(gy, x, w, None, *how.geometry, [True, False, False])[0]


def weight_gradient(gy: Tensor, x: Tensor, w: Tensor, how: Way) -> Tensor:
    return _convolution_backward(gy, x, w, None, *how.geometry, [False, True, False])[1]


def _keep(ctx: Any, how: Way, *factors: Tensor) -> None:
    """What the derivatives of a product need: its two factors. A gradient that nobody sends is None to them."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*factors)
    ctx.how = how


class _Conv(Function):
    """y = x * w + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, how: Way) -> Tensor:
        _keep(ctx, how, x, w)
        ctx.save_for_forward(x, w)
        return forward(x, w, bias, how)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tbias: Tensor | None, _: None) -> Tensor:
        x, w = ctx.saved_tensors
        ty = convolution(tx, w, tbias if tw is None else None, ctx.how) if tx is not None else None
        if tw is not None:
            through_w = convolution(x, tw, tbias, ctx.how)
            ty = through_w if ty is None else ty + through_w
        if ty is None:  # the bias alone moves
            zero = torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)
            ty = convolution(zero, w, tbias, ctx.how)
        return ty

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Any, ...]:
        if gy is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        want = [asked(ctx, i) for i in range(3)]
        how = _carrying(ctx.how)
        if not torch.is_grad_enabled():
            ours = input_gradient(gy, w, x, how) if want[0] and how.gradient else None
            want[0] = want[0] and not how.gradient
            # oneDNN's own takes longer: in a transposed convolution up to three times as long as the two others.
            apart = want[2] and (how.geometry.transposed or gy.dtype == torch.float32)
            gb = gy.sum((0, 2, 3)) if apart else None
            want[2] = want[2] and not apart
            if not any(want):
                return ours, None, gb, None
            sizes = [gy.shape[1]] if want[2] else None
            gx, gw, its_gb = _convolution_backward(gy, x, w, sizes, *how.geometry, want)
            return gx if ours is None else ours, gw, gb if apart else its_gb, None
        gx = _input_gradient(gy, w, x, ctx.how) if want[0] else None
        gw = _weight_gradient(gy, x, w, ctx.how) if want[1] else None
        return gx, gw, gy.sum((0, 2, 3)) if want[2] else None, None


class _InputGradient(Function):
    """Gradient of x, linear in `gy` and in `w`; `x` lends its shape and memory format."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, w: Tensor, x: Tensor, how: Way) -> Tensor:
        _keep(ctx, how, gy, w)
        return input_gradient(gy, w, x, how)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None) -> tuple[Any, ...]:
        if ggx is None:
            return None, None, None, None
        gy, w = ctx.saved_tensors
        ggy = convolution(ggx, w, None, ctx.how) if asked(ctx, 0) else None
        gw = _weight_gradient(gy, ggx, w, ctx.how) if asked(ctx, 1) else None
        return ggy, gw, None, None


class _WeightGradient(Function):
    """Gradient of w, linear in `gy` and in `x`; `w` lends its shape and memory format."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, w: Tensor, how: Way) -> Tensor:
        _keep(ctx, how, gy, x)
        return weight_gradient(gy, x, w, how)

    @staticmethod
    def backward(ctx: Any, ggw: Tensor | None) -> tuple[Any, ...]:
        if ggw is None:
            return None, None, None, None
        gy, x = ctx.saved_tensors
        ggy = convolution(x, ggw, None, ctx.how) if asked(ctx, 0) else None
        gx = _input_gradient(gy, ggw, x, ctx.how) if asked(ctx, 1) else None
        return ggy, gx, None, None


# Where nothing is recorded, the last pass of a penalty among them, a Function would cost its making alone. Inside a
# level of forward mode, where tensors may have tangents, gradients are PyTorch's own, which carry them on.


def _carrying(how: Way) -> Way:
    return Way(how.geometry) if forward_mode() else how


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, how: Way) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, w, bias, _carrying(how))
    return _Conv.apply(node_of(x), node_of(w), None if bias is None else node_of(bias), how)


def _input_gradient(gy: Tensor, w: Tensor, x: Tensor, how: Way) -> Tensor:
    if not torch.is_grad_enabled() or forward_mode():
        return input_gradient(gy, w, x, _carrying(how))
    return _InputGradient.apply(node_of(gy), node_of(w), x.detach(), how)


def _weight_gradient(gy: Tensor, x: Tensor, w: Tensor, how: Way) -> Tensor:
    if not torch.is_grad_enabled() or forward_mode():
        return weight_gradient(gy, x, w, how)
    return _WeightGradient.apply(node_of(gy), node_of(x), w.detach(), how)
