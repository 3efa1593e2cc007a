"""Convolutions and the two changes of scale, lean under double backward.

A convolution is linear in its input and in its weight, so its derivatives of every order are made of three maps: the
convolution itself, the gradient of its input and the gradient of its weight. Below, each is an autograd Function whose
derivatives are the other two, each computed by PyTorch's native kernel and only where the engine asks for it. PyTorch's
own double backward takes the weight's gradient as a convolution with batch and channels exchanged, which is slower, and
averaging's sends zeros back through every layer before it (see docs/penalties.md).

Nearest-neighbor upsampling by 2 and 2x2 averaging are convolutions with a 2x2 box. Followed (or preceded) by a 3x3
convolution they make one 4x4 kernel: the sum of the 3x3 kernel at four offsets. One strided convolution then does the
work of both, with 4 multiply-adds instead of 9 for each output of the upsampling form, and 16 instead of 36 for the
downsampling form. Progressive GANs were published with this form in the authors' code (Karras et al. 2018, appendix A).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastgan.ops import scaled_conv
from fastgan.ops.autograd import asked, autocast, autocasts, node_of, without_autocast
from fastgan.ops.avg_pool2d import avg_pool2d, halve, interpolate_nearest
from fastgan.ops.backend import LEAN, Implementation, Judge, Op, forward_mode, transformed
from fastgan.ops.bias_act import SMALL, bias_act, check
from fastgan.ops.conv_products import CPP, Geometry, Way, convolution, forward, in_channels_last, way_of
from fastgan.ops.kernel_registry import number, plain, tracked

Ints = int | tuple[int, ...]

_nearest, _TWICE = torch._C._nn.upsample_nearest2d, (2.0, 2.0)  # what F.interpolate calls, without its own checks
_PADDED = Way(Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1), forward=True)  # what keeps an image's size

CONV2D = Op("conv2d", {"cpp": CPP, "lean": LEAN}, forward_mode=True)
CONV_TRANSPOSE2D = Op("conv_transpose2d", {"lean": LEAN}, forward_mode=True)
Op("linear")


def _pair(name: str, value: Any) -> tuple[int, ...]:
    if type(value) is int:
        return value, value
    try:
        values = tuple(map(operator.index, value if isinstance(value, Sequence) else (value,)))
    except TypeError:
        values = ()
    if len(values) not in (1, 2):
        raise ValueError(f"{name} must be an integer or a pair of them, got {value!r}")
    return values * 2 if len(values) == 1 else values


def _check(x: Tensor, w: Tensor, bias: Tensor | None, groups: int, transposed: bool) -> None:
    """What would otherwise fail in the middle of a kernel, in another op's words."""
    for name, tensor in (("weight", w), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and not autocasts(x):
            raise TypeError(f"{name} must be {x.dtype}, as input, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as input, got {tensor.device}")
    if x.ndim not in (3, 4):
        raise ValueError(f"input must be [N, C, H, W] or [C, H, W], got {x.ndim} dimensions")
    if groups < 1 or x.shape[-3] % groups:
        raise ValueError(f"groups must be a divisor of the {x.shape[-3]} channels of input, got {groups}")
    channels = x.shape[-3] if transposed else x.shape[-3] // groups
    if w.ndim != 4 or w.shape[0 if transposed else 1] != channels or w.shape[0] % groups:
        form = f"[{channels}, O/groups, kH, kW]" if transposed else f"[O, {channels}, kH, kW] with groups dividing O"
        raise ValueError(f"weight must be {form}, got shape {tuple(w.shape)}")
    outputs = w.shape[1] * groups if transposed else w.shape[0]
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got shape {tuple(bias.shape)}")


def _check_geometry(geometry: Geometry, x: Tensor, w: Tensor) -> None:
    """What PyTorch's kernels would refuse in words that do not name the argument."""
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
                raise ValueError(f"output_padding must be at least 0, {limit}, got {output_padding}")
        elif dilation[i] * (w.shape[2 + i] - 1) >= x.shape[i - 2] + 2 * padding[i]:
            raise ValueError(
                f"weight must have a kernel that fits into the padded image, , got shape {tuple(w.shape)}"
                f"{tuple(s + 2 * p for s, p in zip(x.shape[-2:], padding, strict=True))}"
            )


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
    """`torch.nn.functional.conv2d`, differentiable to any order at the least number of convolutions.

    Args:
        input: [N, I, H, W] or [I, H, W]; weight: [O, I / groups, kH, kW]; bias: [O] or None; one floating dtype, or
            any under autocast.
        stride, padding, dilation, groups: as in torch; padding may be "valid" or, with stride 1, "same".
        backend: "cpp" (the default for few channels on CPUs with AVX-512), "lean" (PyTorch's kernels) or "torch",
            PyTorch's own function.

    Returns:
        [N, O, H', W'] or [O, H', W'].

    Raises:
        TypeError: a dtype differs from the input's.
        ValueError: shapes, devices or geometry do not fit.

    A bias has no gradient from a penalty on the input's gradient and gets None, not zeros: `autograd.grad` with respect
    to it needs `allow_unused=True`; `.backward()` leaves its `.grad` alone.
    """
    _check(input, weight, bias, groups, transposed=False)
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"padding must be numbers, 'valid' or 'same', got {padding!r}")
        if padding == "same" and _pair("stride", stride) != (1, 1):
            raise ValueError(f"padding: was 'same' with stride {stride}; it may be with stride 1 only")
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    odd = False
    if isinstance(padding, str):
        total = (
            [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        )
        odd = any(t % 2 for t in total)
        paddings = tuple(t // 2 for t in total)
    else:
        paddings = _pair("padding", padding)
    geometry = Geometry(strides, paddings, dilations, False, (0, 0), groups)
    _check_geometry(geometry, input, weight)
    input, weight, bias = autocast(input, weight, bias)
    if odd and not transformed():  # the one more goes to the right and the bottom, as in torch
        input, padding = F.pad(input, (0, total[1] % 2, 0, total[0] % 2)), paddings
    batch = input[None] if input.ndim == 3 else input
    name = CONV2D.choose(backend, batch, weight, geometry=geometry)
    if name == "torch" or torch.compiler.is_compiling():
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    how = way_of(name, CONV2D.asked(backend) is not None, batch, geometry)
    if tracked(input, weight, bias):
        y = convolution(batch, weight, bias, how)
    elif how.forward:
        y = forward(batch, weight, bias, how)
    else:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return y[0] if input.ndim == 3 else y


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
    """`torch.nn.functional.conv_transpose2d`, differentiable to any order at the least number of convolutions.

    Arguments as in torch, with weight [I, O / groups, kH, kW]; dtypes, `backend`, what raises and what a bias gets from
    a penalty as in `conv2d`.
    """
    _check(input, weight, bias, groups, transposed=True)
    geometry = Geometry(
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        True,
        _pair("output_padding", output_padding),
        groups,
    )
    _check_geometry(geometry, input, weight)
    name = CONV_TRANSPOSE2D.choose(backend, input, weight)
    if name == "torch" or torch.compiler.is_compiling() or not tracked(input, weight, bias):
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    x, w, bias = autocast(input, weight, bias)
    return convolution(x[None], w, bias, Way(geometry))[0] if x.ndim == 3 else convolution(x, w, bias, Way(geometry))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` itself, so that a critic's layers come from one place.

    PyTorch's double backward of it is at the floor already: four matrix products in a penalty with weight gradients.
    """
    # In forward mode PyTorch's takes a weight that does not move for one that moves by zero, and sends zeros backward.
    if transformed() or not forward_mode():
        return F.linear(input, weight, bias)
    return _Linear.apply(*(None if t is None else node_of(t) for t in autocast(input, weight, bias)))


class _Linear(Function):
    """Of PyTorch's own products, each of which is lean in reverse mode."""

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
            # Dense, as torch before 2.15 wants the tangent of what it takes for a view in the layout of its primal.
            parts.append(tbias.expand(*x.shape[:-1], -1).contiguous())
        return sum(parts[1:], parts[0])

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Tensor | None, ...]:
        if gy is None:
            return None, None, None
        x, w = ctx.saved_tensors
        rows = gy.reshape(-1, gy.shape[-1])
        gx = gy @ w if asked(ctx, 0) else None
        gw = rows.t() @ x.reshape(-1, x.shape[-1]) if asked(ctx, 1) else None
        return gx, gw, rows.sum(0) if ctx.needs_input_grad[2] else None


def _box_matrix() -> Tensor:
    """[9, 16]: a row for each tap of a 3x3 kernel, with ones where it lands in the 4x4 kernel that includes the box."""
    matrix = torch.zeros(3, 3, 4, 4, dtype=torch.float64, device="cpu")
    for y in range(3):
        for x in range(3):
            matrix[y, x, y : y + 2, x : x + 2] = 1.0
    return matrix.view(9, 16)


_BOX = {"down": _box_matrix() * 0.25, "up": _box_matrix().flip(1)}  # flipped: a transposed convolution mirrors it


@functools.cache
def _box_on(device: torch.device, dtype: torch.dtype, way: str) -> Tensor:
    with torch.inference_mode(False):  # what inference makes could never be part of training
        return _BOX[way].to(device, dtype)


def _with_box(w: Tensor, way: str, last: bool = False) -> Tensor:
    """The 4x4 kernel that is `w` [O, I, 3, 3] convolved with a 2x2 box, as matrix products over the taps.

    With `last` it is made in channels_last, as a convolution of images in channels_last would otherwise copy it to in
    its forward, in its input gradient and back again in its weight gradient.
    """
    if transformed() or plain(w):
        box = _BOX[way].to(w.dtype) if w.device.type == "cpu" else _box_on(w.device, w.dtype, way)
    else:  # a class that may take no tensor but its own
        box = torch.tensor(_BOX[way].tolist(), dtype=w.dtype, device=w.device)
    with without_autocast(w):  # the convolution casts the kernel, once
        if not last:
            return (w.reshape(-1, 9) @ box).view(*w.shape[:2], 4, 4)
        taps = w.permute(0, 2, 3, 1).contiguous().view(w.shape[0], 9, w.shape[1])
        kernel = torch.bmm(box.t().expand(w.shape[0], 16, 9), taps)
        return kernel.view(w.shape[0], 4, 4, w.shape[1]).permute(0, 3, 1, 2)


def _form(way: str, pixels: int, pairs: int, last: bool = False, bf16: bool = False) -> str:
    """How to go: "fused", one strided convolution; "steps", two; "small", two of PyTorch's own.

    On a CPU, from times on two cores (benchmarks/ops/bench_conv.py), by the pixels of the smaller image times the
    batch, the pairs of channels, and whether the image is in channels_last. To make the 4x4 kernel costs as much as
    some hundred of its pixels, and to handle it a tenth of a millisecond; in the smallest convolutions Python's
    autograd Functions take a good part of the time. PyTorch's double backward sends no zeros either, only its weight
    gradient is slower. In bfloat16 there is less to save, as the convolution takes half the time and the rest the same.
    """
    work = pixels * pairs
    kernel_pays = pixels >= (256 if pairs <= 2**16 or (last and way == "down") else 400)
    least = 2**19
    if bf16 and (way == "up" or last):
        least = 2**22 if way == "up" and last else 2**21
    if kernel_pays and work >= least and pixels * work >= (2**28 if way == "down" else 2**30):
        return "fused"
    return "small" if work <= 2**21 else "steps"


def _form_of(way: str, x: Tensor, w: Tensor) -> str:
    if not x.is_cpu:
        return "fused"
    # What is exported runs for every batch, in one form: that of one image.
    batch = 1 if torch.compiler.is_exporting() or torch.jit.is_tracing() else x.shape[0]
    pixels = batch * x.shape[2] * x.shape[3]
    pairs, bf16 = w.shape[0] * w.shape[1], x.dtype is torch.bfloat16
    return _form(way, pixels if way == "up" else pixels // 4, pairs, in_channels_last(x), bf16)


def _says(way: str) -> Judge:
    def does(*inputs: Tensor | None, **_: object) -> str | None:
        if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
            return None
        x, w = inputs[:2]
        assert x is not None and w is not None
        size = "interpolate_nearest" if way == "up" else "2x2 mean"
        return {
            "fused": f"one {'transposed ' if way == 'up' else ''}convolution of stride 2",
            "steps": f"conv2d and {size}, as a 4x4 kernel costs more than it saves on so few pixels",
            "small": f"PyTorch's own convolution and {size}, as so little work is done before Python is",
        }[_form_of(way, x, w)]

    return does


@functools.lru_cache(4096)  # cheaper to ask than to reckon
def _small_sizes(way: str, x: torch.Size, w: torch.Size, bias: torch.Size | None, bf16: bool, last: bool) -> bool:
    """Whether these fit together and so little work is done on them that `_small` is the way."""
    if len(x) != 4 or len(w) != 4 or w[1:] != (x[1], 3, 3) or bias not in (None, w[:1]):
        return False
    down = way == "down"
    if down and (x[2] % 2 or x[3] % 2):
        return False
    pixels = x[0] * x[2] * x[3]
    return _form(way, pixels // 4 if down else pixels, w[0] * w[1], last, bf16) == "small"


def _is_one(gain: Any) -> bool:
    return (gain.__class__ is float or gain.__class__ is int) and gain == 1


def _fits_small(way: str, x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether `_small` is the way; where the arguments do not fit it is not, and what comes next says why.

    It is asked in every eager call, and in the smallest each attribute of a tensor that is read here is seen.
    """
    dtype = x.dtype
    bf16 = dtype is torch.bfloat16
    try:
        last = bf16 and in_channels_last(x)
        if not _small_sizes(way, x.shape, w.shape, None if bias is None else bias.shape, bf16, last):
            return False
    except TypeError:  # the sizes that a tracer has for any size have no hash
        return False
    if bias is not None and (bias.dtype is not dtype or not bias.is_cpu):
        return False
    return x.is_cpu and w.is_cpu and w.dtype is dtype


def _small(way: str, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Both steps, each an op of PyTorch's own, or without autograd our convolution where it is the faster."""
    if way == "up":
        x = _nearest(x, None, _TWICE)
    recorded = torch.is_grad_enabled() and (
        x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not recorded and x.dtype is torch.float32 and x.is_contiguous() and not autocasts(x) and _ours(x, w):
        y = forward(x, w, bias, _PADDED)
    else:
        y = F.conv2d(x, w, bias, 1, 1)
    if way == "up":
        return y
    return halve(y) if y.numel() <= SMALL else avg_pool2d(y)


def _ours(x: Tensor, w: Tensor) -> bool:
    return CONV2D.choose(None, x, w, geometry=_PADDED.geometry) == "cpp"


def _reference(way: str, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if way == "up":
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w, bias, padding=1)
    return F.avg_pool2d(F.conv2d(x, w, bias, padding=1), 2)


def _op(name: str, way: str) -> Op:
    lean = Implementation(note="convolutions with lean derivatives", describe_call=_says(way))
    return Op(name, {"triton": scaled_conv.implementation(), "lean": lean})


UPSAMPLE_CONV2D, CONV2D_DOWNSAMPLE = _op("upsample_conv2d", "up"), _op("conv2d_downsample", "down")


def _check_scaled(x: Tensor, w: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [N, I, H, W], got {x.ndim} dimensions")
    sizes = w.shape
    if len(sizes) != 4 or sizes[2] != 3 or sizes[3] != 3 or sizes[1] != x.shape[1]:
        raise ValueError(f"w must be [O, {x.shape[1]}, 3, 3], got shape {tuple(w.shape)}")


def _scaled(
    op: Op,
    backend: str | None,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    act: str,
    negative_slope: float,
    gain: float,
) -> Tensor:
    """Either op, its arguments checked but for what the convolution itself checks."""
    negative_slope, gain = number("negative_slope", negative_slope), number("gain", gain)
    way = "up" if op is UPSAMPLE_CONV2D else "down"
    form = _form_of(way, x, w)
    code = check(x, None, act)
    options = {"act": code, "negative_slope": negative_slope, "gain": gain}
    name = op.choose(backend, x, w, bias, **options)
    if name == "triton":
        w4 = _with_box(w.transpose(0, 1) if way == "up" else w, way)
        _check(x, w4, bias, 1, transposed=way == "up")
        return scaled_conv.scaled_conv(way, x, w4, bias, code, negative_slope, gain)
    if act != "linear" or gain != 1:
        y = _scaled(op, backend, x, w, None, "linear", 0.0, 1.0)
        return bias_act(y, bias, act, negative_slope, gain, backend="torch" if backend == "torch" else None)
    # Under a compiler and in forward mode `choose` says "torch" as well; there what is below is PyTorch's anyway.
    if name == "torch" and (backend == "torch" or (not transformed() and op.asked(None) == "torch")):
        _check(x, w, bias, 1, transposed=False)
        return _reference(way, x, w, bias)
    last = x.is_cpu and in_channels_last(x)
    if way == "up":
        if form != "fused":
            return conv2d(interpolate_nearest(x), w, bias, padding=1)
        return conv_transpose2d(x, _with_box(w.transpose(0, 1), way, last), bias, stride=2, padding=1)
    if form != "fused":
        return avg_pool2d(conv2d(x, w, bias, padding=1))
    # Kernels that `use_backend` asks for take no stride; this op, which has none of that name, is to run all the same.
    inner = "lean" if CONV2D.asked(None) == "cpp" else None
    return conv2d(x, _with_box(w, way, last), bias, stride=2, padding=1, backend=inner)


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
    """act(conv2d(interpolate_nearest(x, 2), w, bias, padding=1)) * gain as one transposed convolution of stride 2
    (in two steps where that is faster).

    Args:
        x: [N, I, H, W]; w: [O, I, 3, 3]; bias: [O] or None; one floating dtype.
        act, negative_slope, gain: as in `bias_act`, which runs after the convolution; "triton" does it in the same
            pass, for the acts linear, relu and lrelu.
        backend: "lean" (the default), "triton", or "torch" (PyTorch's own two functions).

    Returns:
        [N, O, 2H, 2W].

    Raises:
        ValueError: `x` is not 4-dimensional, `w` does not fit it, or `act` is unknown.
    """
    if act == "linear" and _is_one(gain) and UPSAMPLE_CONV2D.free(backend) and _fits_small("up", x, w, bias):
        return _small("up", x, w, bias)
    _check_scaled(x, w)
    return _scaled(UPSAMPLE_CONV2D, backend, x, w, bias, act, negative_slope, gain)


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
    """act(avg_pool2d(conv2d(x, w, bias, padding=1), 2)) * gain as one convolution of stride 2 (in two steps where
    that is faster).

    Args:
        x: [N, I, H, W] with even H and W; w: [O, I, 3, 3]; bias: [O] or None; one floating dtype.
        act, negative_slope, gain, backend: as in `upsample_conv2d`.

    Returns:
        [N, O, H/2, W/2].

    Raises:
        ValueError: `x` is not 4-dimensional or has an odd size, `w` does not fit it, or `act` is unknown.
    """
    if act == "linear" and _is_one(gain) and CONV2D_DOWNSAMPLE.free(backend) and _fits_small("down", x, w, bias):
        return _small("down", x, w, bias)
    _check_scaled(x, w)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: had size {tuple(x.shape[2:])}; height and width may be even")
    return _scaled(CONV2D_DOWNSAMPLE, backend, x, w, bias, act, negative_slope, gain)
