"""A 3x3 convolution after nearest-neighbor upsampling by 2 or before 2x2 averaging, as one convolution of stride 2.

Both changes of scale are convolutions with a 2x2 box. Together with a 3x3 convolution they are one convolution with a
4x4 kernel, the sum of the 3x3 kernel at four offsets, and stride 2: 4 multiply-adds instead of 9 for each output when
upsampling, 16 instead of 36 when downsampling. The authors' code of progressive GANs has this form (Karras et al. 2018,
appendix A).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.arguments import SMALL_NUMEL, is_channels_last, is_plain_tensor, require_number
from fastgan.ops.autograd import autocast, autocast_enabled, computes_in, without_autocast
from fastgan.ops.avg_pool2d import avg_pool2d, halve, interpolate_nearest
from fastgan.ops.bias_act import bias_act, require_bias_and_act
from fastgan.ops.conv import CONV2D, conv2d, conv_transpose2d, require_conv_arguments
from fastgan.ops.conv_products import (
    WINOGRAD,
    Dispatch,
    Geometry,
    convolution,
    forward,
    winograd_not_preferred_reason,
)
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import Implementation, Op, in_transform, size_class
from fastgan.ops.dispatch.torch_private import in_forward_mode, upsample_nearest2d
from fastgan.ops.fallthrough import traced
from fastgan.ops.scaled_conv_triton import scaled_conv, triton_implementation

_SAME_SIZE = Dispatch(Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1), cpp_forward=True)


def _box_matrix() -> Tensor:
    """[9, 16]: a row for each tap of a 3x3 kernel, with ones at its four places in the 4x4 kernel."""
    matrix = torch.zeros(3, 3, 4, 4, dtype=torch.float64, device="cpu")
    for y in range(3):
        for x in range(3):
            matrix[y, x, y : y + 2, x : x + 2] = 1.0
    return matrix.view(9, 16)


_BOX = {"down": _box_matrix() * 0.25, "up": _box_matrix().flip(1)}  # a transposed convolution mirrors it


@functools.cache
def _box_on(device: torch.device, dtype: torch.dtype, direction: str) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        return _BOX[direction].to(device, dtype)


def _with_box(w: Tensor, direction: str, last: bool = False) -> Tensor:
    """`w` [O, I, 3, 3] convolved with a 2x2 box, [O, I, 4, 4], as a matrix product over the taps.

    `last`: make it in channels_last. A convolution of images in channels_last would otherwise copy it to that layout in
    its forward and its input gradient, and back in its weight gradient.
    """
    if in_transform() or is_plain_tensor(w):
        box = _BOX[direction].to(w.dtype) if w.device.type == "cpu" else _box_on(w.device, w.dtype, direction)
    else:  # a subclass of Tensor, which may not mix with plain tensors
        box = torch.tensor(_BOX[direction].tolist(), dtype=w.dtype, device=w.device)
    with without_autocast(w):  # the convolution will cast the kernel, once
        if not last:
            return (w.reshape(-1, 9) @ box).view(*w.shape[:2], 4, 4)
        taps = w.permute(0, 2, 3, 1).contiguous().view(w.shape[0], 9, w.shape[1])
        kernel = torch.bmm(box.t().expand(w.shape[0], 16, 9), taps)
        return kernel.view(w.shape[0], 4, 4, w.shape[1]).permute(0, 3, 1, 2)


def _form(direction: str, pixels: int, pairs: int, last: bool = False, bf16: bool = False) -> str:
    """The shipped table: the fastest way to compute the op on a CPU.

    From times on two cores (benchmarks/ops/bench_conv.py). Making the 4x4 kernel takes as long as about a hundred of
    its pixels, and handling it a tenth of a millisecond; in the smallest convolutions Python's autograd Functions take
    much of the time. PyTorch's double backward of a convolution sends no zeros either, only its weight gradient is
    slower. In bfloat16 there is less to save, as the convolution takes half the time and the rest the same.

    Args:
        direction: "up" or "down".
        pixels: of the smaller image, times the batch.
        pairs: of an input and an output channel.
        last: whether the image is in channels_last.
        bf16: whether it is in bfloat16.

    Returns:
        "fused": one strided convolution; "lean": `conv2d` and the change of scale; "native": the two in PyTorch's own
        ops.
    """
    work = pixels * pairs
    kernel_pays = pixels >= (256 if pairs <= 2**16 or (last and direction == "down") else 400)
    least = 2**19
    if bf16 and (direction == "up" or last):
        least = 2**22 if direction == "up" and last else 2**21
    if kernel_pays and work >= least and pixels * work >= (2**28 if direction == "down" else 2**30):
        return "fused"
    return "native" if work <= 2**21 else "lean"


def _form_of(direction: str, x: Tensor, w: Tensor) -> str:
    if not x.is_cpu:
        return "fused"
    # An exported program runs for every batch size in one form: that of one image.
    batch = 1 if torch.compiler.is_exporting() or torch.jit.is_tracing() else x.shape[0]
    pixels = batch * x.shape[2] * x.shape[3]
    pairs, bf16 = w.shape[0] * w.shape[1], x.dtype is torch.bfloat16
    form = _form(direction, pixels if direction == "up" else pixels // 4, pairs, is_channels_last(x), bf16)
    return "lean" if form == "native" and not is_plain_tensor(x) else form


@functools.lru_cache(4096)  # faster than computing it
def _native_sizes(
    direction: str, x: torch.Size, w: torch.Size, bias: torch.Size | None, bf16: bool, last: bool
) -> bool:
    """Whether these shapes fit together and `_native` is the fastest form for them."""
    if len(x) != 4 or len(w) != 4 or w[1:] != (x[1], 3, 3) or bias not in (None, w[:1]):
        return False
    down = direction == "down"
    if down and (x[2] % 2 or x[3] % 2):
        return False
    pixels = x[0] * x[2] * x[3]
    return _form(direction, pixels // 4 if down else pixels, w[0] * w[1], last, bf16) == "native"


def _is_one(gain: Any) -> bool:
    return (gain.__class__ is float or gain.__class__ is int) and gain == 1


def _is_native(direction: str, x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether `_native` runs this call; False for arguments that do not fit, which are checked afterwards.

    It runs in every eager call; in the smallest ones each attribute of a tensor that is read here adds measurable time.
    """
    dtype = x.dtype
    bf16 = dtype is torch.bfloat16
    try:
        last = bf16 and is_channels_last(x)
        if not _native_sizes(direction, x.shape, w.shape, None if bias is None else bias.shape, bf16, last):
            return False
    except (TypeError, RuntimeError):  # symbolic sizes cannot be hashed, and a proxy of torch.fx has no length
        return False
    if bias is not None and (bias.dtype is not dtype or not bias.is_cpu):
        return False
    return x.is_cpu and w.is_cpu and w.dtype is dtype


def _native(direction: str, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Both steps in PyTorch's own ops; without autograd in the C++ convolution where it is faster."""
    if direction == "up":
        x = upsample_nearest2d(x, None, (2.0, 2.0))
    recorded = torch.is_grad_enabled() and (
        x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not recorded and x.dtype is torch.float32 and x.is_contiguous() and not autocast_enabled(x) and _cpp_runs(x, w):
        y = forward(x, w, bias, _SAME_SIZE)
    else:
        y = F.conv2d(x, w, bias, 1, 1)
    if direction == "up":
        return y
    return halve(y) if y.numel() <= SMALL_NUMEL else avg_pool2d(y)


def _cpp_runs(x: Tensor, w: Tensor) -> bool:
    return CONV2D.choose(None, x, w, geometry=_SAME_SIZE.geometry) == "cpp"


def _reference(direction: str, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if direction == "up":
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w, bias, padding=1)
    return F.avg_pool2d(F.conv2d(x, w, bias, padding=1), 2)


def _classify(x: Tensor, w: Tensor, *_: Tensor | None, act: int = 0, **options: object) -> tuple[object, ...]:
    """The class of a call: pairs of channels matter beside the image."""
    pairs = size_class(w.shape[0] * w.shape[1]) if w.ndim > 1 else 0
    return x.device, computes_in(x), x.is_contiguous(), size_class(x.numel()), (pairs, act)


def _winograd_unsupported_reason(*inputs: Tensor | None, **_: object) -> str | None:
    if in_forward_mode():
        return "it has no forward mode"
    return WINOGRAD.unsupported_reason(*inputs)


def _op(name: str, direction: str) -> Op:
    def form(form: str, note: str) -> Implementation:
        def not_preferred_reason(*inputs: Tensor | None, **_: object) -> str | None:
            if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
                return None if form == "lean" else "it depends on the shapes"
            chosen = _form_of(direction, inputs[0], inputs[1])
            return None if form == chosen else f"{chosen} is faster at these shapes"

        return Implementation(not_preferred_reason=not_preferred_reason, note=note)

    scale = "interpolate_nearest" if direction == "up" else "2x2 mean"

    def pays(*inputs: Tensor | None, **_: object) -> str | None:
        x, w = inputs[:2] if len(inputs) > 1 else (None, None)
        if x is None or w is None:
            return None
        if _form_of(direction, x, w) != "fused":
            return "two steps are faster at these shapes"
        return winograd_not_preferred_reason(x, w, least=2**8 if direction == "up" else 2**10, most=2**16)

    forms = {
        "triton": triton_implementation(),
        "winograd": Implementation(_winograd_unsupported_reason, pays, WINOGRAD.note, "cpu"),
        "fused": form("fused", f"one {'transposed ' if direction == 'up' else ''}convolution of stride 2"),
        "native": form("native", f"PyTorch's own convolution and {scale}, without an autograd Function"),
        "lean": form("lean", f"conv2d and {scale}"),
    }
    return Op(name, forms, classify=_classify, variant=("pairs", "act"))


UPSAMPLE_CONV2D, CONV2D_DOWNSAMPLE = _op("upsample_conv2d", "up"), _op("conv2d_downsample", "down")


def _require_shapes(x: Tensor, w: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [N, I, H, W], got {x.ndim} dimensions")
    sizes = w.shape
    if len(sizes) != 4 or sizes[2] != 3 or sizes[3] != 3 or sizes[1] != x.shape[1]:
        raise ValueError(f"w must be [O, {x.shape[1]}, 3, 3], got shape {tuple(w.shape)}")


def _run(
    op: Op,
    backend: str | None,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    act: str,
    negative_slope: float,
    gain: float,
) -> Tensor:
    """Either op, for shapes of `x` and `w` that fit; the convolution checks the rest."""
    negative_slope, gain = require_number("negative_slope", negative_slope), require_number("gain", gain)
    direction = "up" if op is UPSAMPLE_CONV2D else "down"
    code = require_bias_and_act(x, None, act)
    options = {"act": code, "negative_slope": negative_slope, "gain": gain}
    name = op.choose(backend, x, w, bias, **options)
    if name == "triton":
        w4 = _with_box(w.transpose(0, 1) if direction == "up" else w, direction)
        require_conv_arguments(x, w4, bias, 1, transposed=direction == "up")
        return scaled_conv(direction, x, w4, bias, code, negative_slope, gain)
    if act != "linear" or gain != 1:
        y = _run(op, backend if name == "torch" else name, x, w, None, "linear", 0.0, 1.0)
        return bias_act(y, bias, act, negative_slope, gain, backend="torch" if backend == "torch" else None)
    # `choose` returns "torch" under a compiler and in forward mode too; there the other forms are PyTorch's anyway.
    if name == "torch":
        rewritten = backend is None and (in_transform() or (in_forward_mode() and op.requested(None) != "torch"))
        if rewritten:
            name = "fused" if _form_of(direction, x, w) == "fused" else "lean"
    if name in ("torch", "native"):
        require_conv_arguments(x, w, bias, 1, transposed=False)
        return (_reference if name == "torch" else _native)(direction, x, w, bias)
    if name == "winograd":
        require_conv_arguments(x, w, bias, 1, transposed=False)
        scale = 1 if direction == "up" else -1
        x, w, bias = autocast(x, w, bias)
        return convolution(x, w, bias, Dispatch(_SAME_SIZE.geometry, winograd=True, scale=scale))
    last = is_channels_last(x)
    if direction == "up":
        if name != "fused":
            return conv2d(interpolate_nearest(x), w, bias, padding=1)
        return conv_transpose2d(x, _with_box(w.transpose(0, 1), direction, last), bias, stride=2, padding=1)
    if name != "fused":
        return avg_pool2d(conv2d(x, w, bias, padding=1))
    # use_backend("cpp") requests kernels of conv2d that support no stride; this op has no such implementation and runs.
    inner = "lean" if CONV2D.requested(None) == "cpp" else None
    return conv2d(x, _with_box(w, direction, last), bias, stride=2, padding=1, backend=inner)


def upsample_conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    act: str = "linear",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """act(conv2d(interpolate_nearest(x, 2), w, bias, padding=1)) * gain, as one transposed convolution of stride 2.

    It runs in two steps where that is faster.

    Args:
        x: [N, I, H, W]. The tensors have one floating-point dtype.
        w: [O, I, 3, 3].
        bias: [O] or None.
        act: as in `bias_act`, which runs after the convolution; "triton" runs linear, relu and lrelu in the same pass.
        negative_slope: of lrelu.
        gain: factor of the result.
        backend: "triton", "winograd" (see `conv2d`; 9 products for a pixel of the smaller image), "fused" (one
            convolution of PyTorch's, 16 products), "lean" (two steps), "native" (two steps, without autograd Functions)
            or "torch" (PyTorch's own two functions).

    Returns:
        [N, O, 2H, 2W].

    Raises:
        ValueError: `x` is not 4-dimensional, `w` does not fit it, or `act` is unknown.
    """
    fast = act == "linear" and _is_one(gain) and UPSAMPLE_CONV2D.allows_fast_path(backend, x, w)
    if fast and _is_native("up", x, w, bias):
        return _native("up", x, w, bias)
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        return traced(upsample_conv2d, x, w, bias, act, negative_slope, gain, backend=backend)
    _require_shapes(x, w)
    return _run(UPSAMPLE_CONV2D, backend, x, w, bias, act, negative_slope, gain)


def conv2d_downsample(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    act: str = "linear",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """act(avg_pool2d(conv2d(x, w, bias, padding=1), 2)) * gain, as one convolution of stride 2.

    It runs in two steps where that is faster.

    Args:
        x: [N, I, H, W] with even H and W. The other arguments are as in `upsample_conv2d`.

    Returns:
        [N, O, H/2, W/2].

    Raises:
        ValueError: `x` is not 4-dimensional or has an odd size, `w` does not fit it, or `act` is unknown.
    """
    fast = act == "linear" and _is_one(gain) and CONV2D_DOWNSAMPLE.allows_fast_path(backend, x, w)
    if fast and _is_native("down", x, w, bias):
        return _native("down", x, w, bias)
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        return traced(conv2d_downsample, x, w, bias, act, negative_slope, gain, backend=backend)
    _require_shapes(x, w)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x must have an even height and width, got {tuple(x.shape[2:])}")
    return _run(CONV2D_DOWNSAMPLE, backend, x, w, bias, act, negative_slope, gain)
