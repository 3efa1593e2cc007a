"""The three products of which all derivatives of a convolution consist, and their autograd Functions.

They are the convolution itself, the gradient of its input and that of its weight. Each runs in PyTorch's kernel; or in
csrc/cpu/winograd.cpp, for 3x3 kernels in channels_last, with fewer multiplications than the direct sum; or, the
first two, in csrc/cpu/conv2d.cpp, which works on contiguous tensors as they are where oneDNN reorders them to blocks of
16 channels and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import dense, dense_like, is_channels_last
from fastgan.ops.autograd import computes_in, needs_gradient, non_leaf
from fastgan.ops.dispatch.backend import Implementation, size_class
from fastgan.ops.dispatch.kernel_registry import kernel_implementations
from fastgan.ops.dispatch.torch_private import in_forward_mode, multiplies_float16
from fastgan.utils.system import cpu_flags


@cache
def _multiplies_float16() -> bool:
    """Whether oneDNN has float16 products on this CPU; else PyTorch's own take 17 times as long as those of float32."""
    try:
        return bool(multiplies_float16())
    except RuntimeError:  # a PyTorch without oneDNN
        return False


def multiplied_in_float32(x: Tensor) -> bool:
    """Whether products of x are computed in float32 and rounded, as tensor cores do: float16 on most CPUs."""
    return x.dtype == torch.float16 and x.is_cpu and not _multiplies_float16()


def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """PyTorch's kernel."""
    if multiplied_in_float32(x):
        wide = None if bias is None else bias.float()
        return torch.convolution(x.float(), w.float(), wide, *geometry).to(x.dtype)
    return torch.convolution(x, w, bias, *geometry)


def _convolution_backward(
    gy: Tensor, x: Tensor, w: Tensor, bias_sizes: list[int] | None, geometry: Geometry, need: list[bool]
) -> Sequence[Any]:
    """PyTorch's kernels of the gradients of x, w and the bias that are needed."""
    backward = torch.ops.aten.convolution_backward.default
    if multiplied_in_float32(x):
        found = backward(gy.float(), x.float(), w.float(), bias_sizes, *geometry, need)
        return [None if t is None else t.to(x.dtype) for t in found]
    return backward(gy, x, w, bias_sizes, *geometry, need)


class Geometry(NamedTuple):
    """The arguments of a convolution besides its tensors, in ATen's order."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class Dispatch(NamedTuple):
    """A geometry, and which kernels are not PyTorch's: the convolution, the gradient of its input, or all three.

    With `winograd`, `scale` is -1 for a convolution before averaging over 2x2 pixels, and 1 for one after upsampling.
    """

    geometry: Geometry
    cpp_forward: bool = False
    cpp_input_gradient: bool = False
    winograd: bool = False
    scale: int = 0


_CPP = kernel_implementations("conv2d")["cpp"]


def _not_plain(inputs: Sequence[Tensor | None], geometry: Geometry | None, *others: torch.dtype) -> str | None:
    """Why a call is not one in float32 with stride 1, dilation 1 and one group, which the C++ kernels compute.

    `others`: further dtypes that the kernel supports.
    """
    for t in inputs:
        if t is not None and computes_in(t) not in (torch.float32, *others):
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in (torch.float32, *others))
            return f"it supports {names}, not {str(computes_in(t)).removeprefix('torch.')}"
    if geometry is not None and (geometry.stride, geometry.dilation, geometry.groups) != ((1, 1), (1, 1), 1):
        return "it supports stride 1, dilation 1 and one group"
    return None


def _cpp_unsupported_reason(*inputs: Tensor | None, geometry: Geometry | None = None, **_: object) -> str | None:
    if reason := _not_plain(inputs, geometry):
        return reason
    if geometry is not None and len(inputs) > 1:
        x, w = inputs[:2]
        assert x is not None and w is not None
        for size, padding, kernel in zip(x.shape[2:], geometry.padding, w.shape[2:], strict=True):
            if not 0 <= padding < kernel <= size + 2 * padding:
                return "it supports paddings below the kernel's size and no kernel larger than the image"
    return _CPP.unsupported_reason(*inputs) or _register_fakes()


def _cpp_not_preferred_reason(*inputs: Tensor | None, **_: object) -> str | None:
    """Crossovers measured on two cores with AVX-512 (docs/penalties.md)."""
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return None
    x, w = inputs[:2]
    assert x is not None and w is not None
    if reason := _slow_anywhere():
        return reason
    if is_channels_last(x):
        few = x.shape[1] <= 4 and w.shape[2] > 1
        return None if few else "oneDNN's kernels need no reordering in channels_last"
    return None if w.shape[0] * w.shape[1] <= 2304 else "beyond 2304 pairs of channels oneDNN's kernels are faster"


def _slow_anywhere() -> str | None:
    """Why the C++ kernels are not the default now, whatever the shapes are."""
    if in_forward_mode():
        return "in forward mode PyTorch propagates zeros without computing them"
    return None if _instructions().startswith("avx512") else "without AVX-512 oneDNN's kernels are the default"


@cache
def _instructions() -> str:
    return str(torch.ops.fastgan.cpu_instructions())


CONV_VARIANT = ("kernel", "stride", "pairs", "groups")


def classify(x: Tensor, w: Tensor, geometry: Geometry | None = None) -> tuple[object, ...]:
    """The class of a convolution: pairs of channels, and the power of 2 of groups, matter beside the image."""
    out, into, kernel, _ = w.shape
    stride, groups = (1, 1) if geometry is None else (geometry.stride[0], geometry.groups)
    variant = kernel, stride, size_class(out * into), (groups - 1).bit_length()
    return x.device, computes_in(x), x.is_contiguous(), size_class(x.numel()), variant


CPP = Implementation(
    unsupported_reason=_cpp_unsupported_reason,
    not_preferred_reason=_cpp_not_preferred_reason,
    note="C++ kernels; PyTorch's for the weight's gradient",
    device="cpu",
)


def _winograd_unsupported_reason(*inputs: Tensor | None, geometry: Geometry | None = None, **_: object) -> str | None:
    if reason := _not_plain(inputs, geometry, torch.bfloat16):
        return reason
    if len(inputs) > 1:
        x, w = inputs[:2]
        assert x is not None and w is not None
        if w.shape[2:] != (3, 3):
            return "it supports kernels of 3x3"
        if geometry is not None:
            rows, columns = geometry.padding
            if rows != columns or rows > 2 or min(x.shape[2:]) + 2 * rows < 3:
                return "it supports the same padding of 0 to 2 in both directions, and images that the kernel fits into"
    if reason := _CPP.unsupported_reason(*inputs) or _register_fakes():
        return reason
    bf16 = bool(inputs) and inputs[0] is not None and computes_in(inputs[0]) == torch.bfloat16
    return "bfloat16 needs a CPU with avx512_bf16" if bf16 and _instructions() != "avx512_bf16" else None


def winograd_not_preferred_reason(
    *inputs: Tensor | None, least: int = 2**10, most: int = 2**15, **_: object
) -> str | None:
    """The shipped table: crossovers on one core with AVX-512 (`benchmarks/ops/bench_conv.py`).

    Args:
        inputs: image and kernel.
        least: pixels of the image from which on it pays.
        most: pairs of channels up to which it does, as the cache has room for the transformed kernel.
    """
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return None
    x, w = inputs[:2]
    assert x is not None and w is not None
    if reason := _slow_anywhere():
        return reason
    if computes_in(x) == torch.bfloat16 and "amx_bf16" in cpu_flags():
        return "oneDNN's kernels have AMX"
    if not is_channels_last(x):
        return "it works in channels_last"
    if min(w.shape[:2]) < 32 or w.shape[0] * w.shape[1] > most or x.shape[0] * x.shape[2] * x.shape[3] < least:
        return f"it pays from 32 channels and {least} pixels on, and up to {most} pairs of channels"
    return None


WINOGRAD = Implementation(
    unsupported_reason=_winograd_unsupported_reason,
    not_preferred_reason=winograd_not_preferred_reason,
    note="C++ kernels by minimal filtering",
    device="cpu",
)


def dispatch_of(implementation: str, both: bool, x: Tensor, geometry: Geometry) -> Dispatch:
    """The products that the C++ kernels compute: `both` where they were requested, or measured to be faster."""
    if implementation == "winograd":
        return Dispatch(geometry, winograd=True)
    cpp = implementation == "cpp"
    # The shipped table: in channels_last oneDNN's forward product is the faster one for a first layer.
    return Dispatch(geometry, cpp and (both or not is_channels_last(x)), cpp)


@cache
def _register_fakes() -> None:
    def result(x: Tensor, channels: int, w: Tensor, padding: tuple[int, int], sign: int) -> Tensor:
        sizes = [s + sign * (2 * p - k + 1) for s, p, k in zip(x.shape[2:], padding, w.shape[2:], strict=True)]
        last = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        return torch.empty((x.shape[0], channels, *sizes), dtype=x.dtype, device=x.device, memory_format=last)

    @torch.library.register_fake("fastgan::conv2d_forward")
    def _(x: Tensor, w: Tensor, bias: Tensor | None, pad_h: int, pad_w: int) -> Tensor:
        return result(x, w.shape[0], w, (pad_h, pad_w), 1)

    @torch.library.register_fake("fastgan::conv2d_input_gradient")
    def _(gy: Tensor, w: Tensor, pad_h: int, pad_w: int) -> Tensor:
        return result(gy, w.shape[1], w, (pad_h, pad_w), -1)

    def last(x: Tensor, sizes: Sequence[int]) -> Tensor:
        return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def sized(x: Tensor, padding: int, scale: int) -> list[int]:
        return [(s * 2 if scale > 0 else s // 2) if scale else s + 2 * padding - 2 for s in x.shape[2:]]

    @torch.library.register_fake("fastgan::winograd_forward")
    def _(x: Tensor, w: Tensor, bias: Tensor | None, padding: int, scale: int) -> Tensor:
        return last(x, [x.shape[0], w.shape[0], *sized(x, padding, scale)])

    @torch.library.register_fake("fastgan::winograd_input_gradient")
    def _(gy: Tensor, w: Tensor, padding: int, scale: int) -> Tensor:
        return last(gy, [gy.shape[0], w.shape[1], *sized(gy, 2 - padding, -scale)])

    @torch.library.register_fake("fastgan::winograd_weight_gradient")
    def _(gy: Tensor, x: Tensor, padding: int, scale: int) -> Tensor:
        return last(x, [gy.shape[1], x.shape[1], 3, 3])


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def forward(x: Tensor, w: Tensor, bias: Tensor | None, dispatch: Dispatch) -> Tensor:
    if dispatch.winograd:
        how = dispatch.geometry.padding[0], dispatch.scale
        return torch.ops.fastgan.winograd_forward.default(_last(x), w, bias, *how)
    if dispatch.cpp_forward:
        return torch.ops.fastgan.conv2d_forward.default(dense(x), w, bias, *dispatch.geometry.padding)
    return _convolution(x, w, bias, dispatch.geometry)


def input_gradient(gy: Tensor, w: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
    if dispatch.winograd:
        how = dispatch.geometry.padding[0], dispatch.scale
        return torch.ops.fastgan.winograd_input_gradient.default(_last(gy), w, *how)
    if dispatch.cpp_input_gradient:
        return torch.ops.fastgan.conv2d_input_gradient.default(dense_like(gy, x), w, *dispatch.geometry.padding)
    return _convolution_backward(gy, x, w, None, dispatch.geometry, [True, False, False])[0]


def weight_gradient(gy: Tensor, x: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
    if dispatch.winograd:
        how = dispatch.geometry.padding[0], dispatch.scale
        return torch.ops.fastgan.winograd_weight_gradient.default(_last(gy), _last(x), *how)
    if _is_faster_in_channels_last(x, w, dispatch.geometry):
        gy, x = (t.contiguous(memory_format=torch.channels_last) for t in (gy, x))
        found = _convolution_backward(gy, x, w, None, dispatch.geometry, [False, True, False])[1]
        return found.contiguous() if w.is_contiguous() else found
    return _convolution_backward(gy, x, _allocatable(w), None, dispatch.geometry, [False, True, False])[1]


def _is_faster_in_channels_last(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN's gradient of the weight takes up to half of the time there, with both copies.

    In contiguous tensors groups of 2 to 4 channels take it up to six times as long as the convolution itself (measured
    on an AMD EPYC with AVX-512, 64 to 256 channels at 4 to 32 px).
    """
    if geometry.groups == 1 or not x.is_cpu or x.dtype != torch.float32 or not x.is_contiguous():
        return False
    return 2 <= w.shape[1] <= 4 and w.shape[0] // geometry.groups <= 4 and w.shape[2] * w.shape[3] > 1


def _allocatable(w: Tensor) -> Tensor:
    """w, contiguous where the gradient would be allocated in strides of w that the kernel then rejects.

    On CPUs, float64 and float16 run in kernels whose requirement depends on the strides of all three tensors; so do
    float32 and bfloat16 where oneDNN does not take them, which strides of neither memory format may cause.
    """
    if not w.is_cpu:
        return w
    usual = w.dtype not in (torch.float64, torch.float16) and (w.is_contiguous() or is_channels_last(w))
    return w if usual else w.contiguous()


def _keep(ctx: Any, dispatch: Dispatch, *factors: Tensor) -> None:
    """Keep the two factors of a product for its derivatives."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*factors)
    ctx.dispatch = dispatch


class _Conv(Function):
    """y = x * w + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, dispatch: Dispatch) -> Tensor:
        _keep(ctx, dispatch, x, w)
        ctx.save_for_forward(x, w)
        return forward(x, w, bias, dispatch)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tbias: Tensor | None, _: None) -> Tensor:
        x, w = ctx.saved_tensors
        ty = convolution(tx, w, tbias if tw is None else None, ctx.dispatch) if tx is not None else None
        if tw is not None:
            through_w = convolution(x, tw, tbias, ctx.dispatch)
            ty = through_w if ty is None else ty + through_w
        if ty is None:  # only the bias has a tangent
            zero = torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)
            ty = convolution(zero, w, tbias, ctx.dispatch)
        return ty

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Any, ...]:
        if gy is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        need = [needs_gradient(ctx, i) for i in range(3)]
        dispatch = _native_in_forward_mode(ctx.dispatch)
        if not torch.is_grad_enabled():
            # oneDNN's sum takes longer: in a transposed convolution up to three times as long as the other gradients.
            own = (
                dispatch.cpp_input_gradient or dispatch.winograd,
                dispatch.winograd,
                dispatch.winograd or dispatch.geometry.transposed or gy.dtype == torch.float32,
            )
            ours = (
                input_gradient(gy, w, x, dispatch) if need[0] and own[0] else None,
                weight_gradient(gy, x, w, dispatch) if need[1] and own[1] else None,
                gy.sum((0, 2, 3)) if need[2] and own[2] else None,
            )
            need = [n and not o for n, o in zip(need, own, strict=True)]
            if not any(need):
                return *ours, None
            sizes = [gy.shape[1]] if need[2] else None
            native = _convolution_backward(gy, x, _allocatable(w), sizes, dispatch.geometry, need)
            return *(a if b is None else b for a, b in zip(native, ours, strict=True)), None
        gx = _input_gradient(gy, w, x, ctx.dispatch) if need[0] else None
        gw = _weight_gradient(gy, x, w, ctx.dispatch) if need[1] else None
        return gx, gw, gy.sum((0, 2, 3)) if need[2] else None, None


class _InputGradient(Function):
    """Gradient of x, linear in `gy` and in `w`; of `x` it uses shape and memory format."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, w: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
        _keep(ctx, dispatch, gy, w)
        return input_gradient(gy, w, x, dispatch)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None) -> tuple[Any, ...]:
        if ggx is None:
            return None, None, None, None
        gy, w = ctx.saved_tensors
        ggy = convolution(ggx, w, None, ctx.dispatch) if needs_gradient(ctx, 0) else None
        gw = _weight_gradient(gy, ggx, w, ctx.dispatch) if needs_gradient(ctx, 1) else None
        return ggy, gw, None, None


class _WeightGradient(Function):
    """Gradient of w, linear in `gy` and in `x`; of `w` it uses shape and memory format."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
        _keep(ctx, dispatch, gy, x)
        return weight_gradient(gy, x, w, dispatch)

    @staticmethod
    def backward(ctx: Any, ggw: Tensor | None) -> tuple[Any, ...]:
        if ggw is None:
            return None, None, None, None
        gy, x = ctx.saved_tensors
        ggy = convolution(x, ggw, None, ctx.dispatch) if needs_gradient(ctx, 0) else None
        gx = _input_gradient(gy, ggw, x, ctx.dispatch) if needs_gradient(ctx, 1) else None
        return ggy, gx, None, None


# Where autograd is off, as in the last pass of a penalty, the products run without the overhead of a Function. In
# forward mode, where tensors may have tangents, they are PyTorch's, which propagate tangents.


def _native_in_forward_mode(dispatch: Dispatch) -> Dispatch:
    if not in_forward_mode():
        return dispatch
    if dispatch.scale:  # only a backward pass gets here; the op itself runs in PyTorch's forms in forward mode
        raise NotImplementedError("backend 'winograd' has no tangents of gradients: use_backend('fused') has")
    return Dispatch(dispatch.geometry)


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, dispatch: Dispatch) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, w, bias, _native_in_forward_mode(dispatch))
    return _Conv.apply(non_leaf(x), non_leaf(w), None if bias is None else non_leaf(bias), dispatch)


def _input_gradient(gy: Tensor, w: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
    if not torch.is_grad_enabled() or in_forward_mode():
        return input_gradient(gy, w, x, _native_in_forward_mode(dispatch))
    return _InputGradient.apply(non_leaf(gy), non_leaf(w), x.detach(), dispatch)


def _weight_gradient(gy: Tensor, x: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
    if not torch.is_grad_enabled() or in_forward_mode():
        return weight_gradient(gy, x, w, _native_in_forward_mode(dispatch))
    return _WeightGradient.apply(non_leaf(gy), non_leaf(x), w.detach(), dispatch)
