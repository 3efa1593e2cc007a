"""4x4 convolution with stride 2, its adjoint and its weight gradient, as implicit matrix products.

    down:    small[n, k, i, j] = sum over c, p, q of large[n, c, 2 i + p - 1, 2 j + q - 1] w[k, c, p, q]
    up:      its adjoint, from small to large: a transposed convolution
    weight:  gw[k, c, p, q] = sum over n, i, j of small[n, k, i, j] large[n, c, 2 i + p - 1, 2 j + q - 1]

In `fastgan.ops`, `conv2d_downsample` is `down` and `upsample_conv2d` is `up`, with a 3x3 kernel spread over 4x4 taps.
The derivatives of each of the three, of every order, are among the other two. In `up`, a pixel of each of the four
parities (even or odd row and column) uses 2x2 of the 16 taps.

large: [N, C, 2H, 2W]; small: [N, K, H, W]; w: [K, C, 4, 4]; any strides; float32, float16 or bfloat16, the same dtype
for all tensors of a call. Sums are float32; float32 products are exact or TF32, as torch's setting for convolutions
says. Each program owns its outputs: there are no atomics, and results are bit-identical between runs. `down` and `up`
end with act(y + bias) * gain for piecewise linear acts, as in `fastgan.ops.bias_act`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .bias_act import activate
from .launch import Plan, ceil_div, kind_of, needs_int64_offsets, next_power_of_2

LINEAR = 0  # index into fastgan.ops.bias_act.ACTS

# A weight gradient has few elements, each a sum over all pixels. The pixels are split into parts to get about this many
# programs, as long as the partial sums stay below this many elements.
_PROGRAMS, _PARTIAL = 1024, 2**22


@triton.jit
def _pixels(first, count, height, width, BLOCK: tl.constexpr):
    """Image, row, column and mask of BLOCK pixels of small images."""
    at = first + tl.arange(0, BLOCK)
    rest = at % (height * width)
    return at // (height * width), rest // width, rest % width, at < count


@triton.jit
def _offsets(image, y, x, strides, INT64: tl.constexpr):
    if INT64:
        image = image.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return image * strides[0] + y * strides[2] + x * strides[3]


@triton.jit
def _channels(channel, strides, INT64: tl.constexpr):
    if INT64:
        channel = channel.to(tl.int64)
    return channel * strides[1]


@triton.jit
def _of_large(image, i, j, inside, tap, height, width, strides, INT64: tl.constexpr):
    """Offsets and mask of the large pixels that a tap of the 4x4 kernel pairs with pixels i, j of the small image."""
    y = 2 * i + tap // 4 - 1
    x = 2 * j + tap % 4 - 1
    inside = inside & (y >= 0) & (y < 2 * height) & (x >= 0) & (x < 2 * width)
    return _offsets(image, y, x, strides, INT64), inside


@triton.jit
def _finish(
    total, bias, to, to_strides, pixels, inside, channel, channels, slope, gain, ACT: tl.constexpr, INT64: tl.constexpr
):
    """Store act(total + bias) * gain."""
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    total = activate(total, slope, gain, ACT).to(to.dtype.element_ty)
    at = to + pixels[:, None] + _channels(channel, to_strides, INT64)[None, :]
    tl.store(at, total, mask=inside[:, None] & (channel < channels)[None, :])


@triton.jit
def down_kernel(
    large, w, bias, small, large_strides, small_strides, count, height, width, slope, gain,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
    ACT: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w: [16, K, C], contiguous. Rows are pixels, columns are channels of the small images."""
    across = tl.cdiv(K, COLS)
    image, i, j, inside = _pixels(tl.program_id(0) // across * ROWS, count, height, width, ROWS)
    k = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    chunks: tl.constexpr = (C + CHUNK - 1) // CHUNK
    for step in range(16 * chunks):  # one loop over taps and channels, for pipelined loads
        tap = step // chunks
        c = step % chunks * CHUNK + tl.arange(0, CHUNK)
        pixels, seen = _of_large(image, i, j, inside, tap, height, width, large_strides, INT64)
        at = large + pixels[:, None] + _channels(c, large_strides, INT64)[None, :]
        taps = w + tap * (K * C) + k[None, :] * C + c[:, None]
        if C % CHUNK == 0:
            a = tl.load(at, mask=seen[:, None], other=0.0)
            b = tl.load(taps, mask=(k < K)[None, :], other=0.0)
        else:
            a = tl.load(at, mask=seen[:, None] & (c < C)[None, :], other=0.0)
            b = tl.load(taps, mask=(k < K)[None, :] & (c < C)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    pixels = _offsets(image, i, j, small_strides, INT64)
    _finish(total, bias, small, small_strides, pixels, inside, k, K, slope, gain, ACT, INT64)


@triton.jit
def up_kernel(
    small, w, bias, large, small_strides, large_strides, count, height, width, slope, gain,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
    ACT: tl.constexpr, INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w: [16, C, K], contiguous. Rows are pixels of one parity, columns are channels of the large images."""
    # Programs of the four parities of the same pixels are neighbors: they read the same and write interleaved pixels.
    parity = tl.program_id(0) % 4
    below = parity // 2
    right = parity % 2
    across = tl.cdiv(C, COLS)
    program = tl.program_id(0) // 4
    image, i, j, inside = _pixels(program // across * ROWS, count, height, width, ROWS)
    c = program % across * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    chunks: tl.constexpr = (K + CHUNK - 1) // CHUNK
    for step in range(4 * chunks):
        # Row 2 i + below of the large image uses rows i + below - 1 and i + below of the small one, with taps 3 - below
        # and 1 - below. Columns are alike.
        down = step // chunks // 2
        over = step // chunks % 2
        k = step % chunks * CHUNK + tl.arange(0, CHUNK)
        y = i + (below - 1 + down)
        x = j + (right - 1 + over)
        seen = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixels = _offsets(image, y, x, small_strides, INT64)
        at = small + pixels[:, None] + _channels(k, small_strides, INT64)[None, :]
        tap = (3 - below - 2 * down) * 4 + 3 - right - 2 * over
        taps = w + tap * (K * C) + c[None, :] * K + k[:, None]
        if K % CHUNK == 0:
            a = tl.load(at, mask=seen[:, None], other=0.0)
            b = tl.load(taps, mask=(c < C)[None, :], other=0.0)
        else:
            a = tl.load(at, mask=seen[:, None] & (k < K)[None, :], other=0.0)
            b = tl.load(taps, mask=(c < C)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    pixels = _offsets(image, 2 * i + below, 2 * j + right, large_strides, INT64)
    _finish(total, bias, large, large_strides, pixels, inside, c, C, slope, gain, ACT, INT64)


@triton.jit
def weight_kernel(
    small, large, partial, small_strides, large_strides, count, height, width, part,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
    INT64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial: float32 [parts, 16, K, C], each part over `part` pixels, a multiple of CHUNK."""
    across = tl.cdiv(C, COLS)
    below = tl.cdiv(K, ROWS)
    program = tl.program_id(0)
    tap = program % 16  # neighboring programs read the same pixels
    c = program // 16 % across * COLS + tl.arange(0, COLS)
    k = program // 16 // across % below * ROWS + tl.arange(0, ROWS)
    which = program // 16 // across // below
    first = which * part
    of_small = _channels(k, small_strides, INT64)
    of_large = _channels(c, large_strides, INT64)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(first, tl.minimum(first + part, count), CHUNK):
        image, i, j, inside = _pixels(begin, count, height, width, CHUNK)
        at = small + of_small[:, None] + _offsets(image, i, j, small_strides, INT64)[None, :]
        a = tl.load(at, mask=(k < K)[:, None] & inside[None, :], other=0.0)
        pixels, seen = _of_large(image, i, j, inside, tap, height, width, large_strides, INT64)
        b = tl.load(large + pixels[:, None] + of_large[None, :], mask=seen[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = partial + (which * 16 + tap).to(tl.int64) * (K * C) + k[:, None] * C + c[None, :]
    tl.store(to, total, mask=(k < K)[:, None] & (c < C)[None, :])


def _padded(channels: int) -> int:
    return min(max(16, next_power_of_2(channels)), 256)


@functools.lru_cache(maxsize=4096)
def _plan(
    op: str, where: tiles.Place, kind: str, precision: str, act: int,
    sizes: tuple[int, ...], c: int, small: tuple[int, ...], large: tuple[int, ...],
) -> Plan:  # fmt: skip
    """The launch of a kernel for small images of these sizes [N, K, H, W], and c channels and the strides of both."""
    n, k, height, width = sizes
    count, weight = n * height * width, op == "scaled_conv_weight"
    # Channels of the results, and those that are summed at a time; the strides of what is read in the inner loop.
    results, summed, read = {
        "scaled_conv_down": (k, c, large), "scaled_conv_up": (c, k, small),
        "scaled_conv_weight": (max(c, k), 256, small),
    }[op]  # fmt: skip
    # Unless the channels of a pixel are contiguous and aligned to 16, addresses need more registers.
    odd = read[1] != 1 or any(stride % 16 for stride in (read[0], *read[2:]))
    tile = tiles.lookup(op, kind, _padded(results), where, odd)
    chunk = min(tile.chunk, _padded(summed))
    large_sizes = (n, c, 2 * height, 2 * width)
    constants: dict[str, Any] = {
        "small_strides": small, "large_strides": large, "count": count, "height": height, "width": width,
        "C": c, "K": k, "ROWS": tile.rows, "COLS": tile.cols, "CHUNK": chunk, "PRECISION": precision,
        "INT64": needs_int64_offsets((large_sizes, large), (sizes, small), dims=4),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if not weight:
        programs = ceil_div(count, tile.rows) * ceil_div(results, tile.cols)
        return Plan((programs if op == "scaled_conv_down" else 4 * programs,), {**constants, "ACT": act})
    programs = 16 * ceil_div(k, tile.rows) * ceil_div(c, tile.cols)
    parts = min(ceil_div(_PROGRAMS, programs), ceil_div(count, 8 * chunk), max(1, _PARTIAL // (16 * k * c)))
    part = ceil_div(ceil_div(count, parts), chunk) * chunk
    parts = ceil_div(count, part)
    return Plan((programs * parts,), {**constants, "part": part}, (parts, 4, 4, k, c))


def _plan_of(op: str, small: Tensor, large: Tensor, act: int = LINEAR) -> Plan:
    kind, precision = kind_of(small.dtype, "conv")
    where = tiles.place(op, small.device)
    return _plan(op, where, kind, precision, act, small.shape, large.shape[1], small.stride(), large.stride())


def _image(like: Tensor, *shape: int) -> Tensor:
    """Uninitialized image in the memory format of `like`."""
    last = like.stride(1) == 1 and like.shape[1] > 1
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form)


def down(
    large: Tensor, w: Tensor, bias: Tensor | None = None, act: int = LINEAR, slope: float = 0.0, gain: float = 1.0
) -> Tensor:
    """Convolution with stride 2, then act(y + bias) * gain.

    Args:
        large: [N, C, 2H, 2W].
        w: [K, C, 4, 4].
        bias: [K].
        act: index into `fastgan.ops.bias_act.ACTS`, of a piecewise linear act.
        slope: negative slope of lrelu.
        gain: factor of the activation.

    Returns:
        [N, K, H, W], in the memory format of `large`.
    """
    n, _, height, width = large.shape
    small = _image(large, n, w.shape[0], height // 2, width // 2)
    _plan_of("scaled_conv_down", small, large, act).launch(
        down_kernel, large.device, large=large, w=w.permute(2, 3, 0, 1).contiguous(), bias=bias, small=small,
        slope=slope, gain=gain,
    )  # fmt: skip
    return small


def up(
    small: Tensor, w: Tensor, bias: Tensor | None = None, act: int = LINEAR, slope: float = 0.0, gain: float = 1.0
) -> Tensor:
    """Transposed convolution with stride 2, then act(y + bias) * gain.

    Args:
        small: [N, K, H, W].
        w: [K, C, 4, 4].
        bias: [C].
        act, slope, gain: as in `down`.

    Returns:
        [N, C, 2H, 2W], in the memory format of `small`.
    """
    n, _, height, width = small.shape
    large = _image(small, n, w.shape[1], 2 * height, 2 * width)
    _plan_of("scaled_conv_up", small, large, act).launch(
        up_kernel, small.device, small=small, w=w.permute(2, 3, 1, 0).contiguous(), bias=bias, large=large,
        slope=slope, gain=gain,
    )  # fmt: skip
    return large


def weight(small: Tensor, large: Tensor) -> Tensor:
    """Gradient of the weight, [K, C, 4, 4], from small [N, K, H, W] and large [N, C, 2H, 2W]."""
    plan = _plan_of("scaled_conv_weight", small, large)
    partial = torch.empty(*plan.partial, dtype=torch.float32, device=small.device)
    plan.launch(weight_kernel, small.device, small=small, large=large, partial=partial)
    return (partial[0] if len(partial) == 1 else partial.sum(0)).permute(2, 3, 0, 1).to(small.dtype)
