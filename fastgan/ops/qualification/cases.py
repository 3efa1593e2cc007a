"""How each op is called to be measured, on tensors like those of a call at hand: small, odd and as large.

`cases_of` is the only function that others need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.ops.affine_grid_sample import affine_grid_sample
from fastgan.ops.arguments import accumulation_dtype, is_channels_last
from fastgan.ops.attention import scaled_dot_product_attention
from fastgan.ops.avg_pool2d import avg_pool2d
from fastgan.ops.bias_act import ACTS, LRELU, bias_act
from fastgan.ops.bias_act_pixel_norm import bias_act_pixel_norm
from fastgan.ops.conv import conv2d, conv_transpose2d
from fastgan.ops.conv_products import Geometry
from fastgan.ops.dispatch.backend import CallClass
from fastgan.ops.minibatch_stddev import minibatch_stddev
from fastgan.ops.norms import group_norm, instance_norm, layer_norm
from fastgan.ops.pixel_norm import pixel_norm
from fastgan.ops.scaled_conv import conv2d_downsample, upsample_conv2d

Shape = tuple[int, ...]
Shapes = tuple[Shape | None, ...]

# What is timed is cut to so many elements of the first input, and so many multiply-adds in a convolution: tens of
# milliseconds for forward and both backward passes on two cores.
LARGEST_NUMEL, LARGEST_WORK = 2**21, 2**29


class Case(NamedTuple):
    """One call of an op.

    Attributes:
        call: the op, called as call(implementation, *tensors).
        shapes: of its tensors, those that get gradients; None where the call has no such tensor.
        options: as `Op.choose` gets them.
    """

    call: Callable[..., Tensor]
    shapes: Shapes
    options: Mapping[str, object]


class Cases(NamedTuple):
    """The calls that stand for a class.

    Attributes:
        small, odd: compared with plain PyTorch.
        timed: of the size at hand.
        channels_last: memory format of images.
    """

    small: Case
    odd: Case
    timed: Case
    channels_last: bool

    def tensors(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor | None]:
        """Normal random numbers of `dtype`, the same on every device. A bias is large: no act is near its kink."""
        generator = torch.Generator("cpu").manual_seed(seed)
        made: list[Tensor | None] = []
        for shape in case.shapes:
            if shape is None:
                made.append(None)
                continue
            values = torch.randn(shape, generator=generator, device="cpu")
            if len(shape) == 1 and "act" in case.options:
                values = values + 6 * (1 - 2 * (torch.arange(shape[0], device="cpu") % 2))
            elif len(shape) == 4 and made:  # a weight: results of about the size of the images
                values = values / math.sqrt(math.prod(shape[1:]))
            values = values.to(device, dtype)
            if self.channels_last and len(shape) == 4 and not made:
                values = values.contiguous(memory_format=torch.channels_last)
            made.append(values)
        return made


def cases_of(op: str, key: CallClass, inputs: tuple[Tensor | None, ...], options: Mapping[str, object]) -> Cases:
    """The calls that stand for a class of which `inputs` and `options` are one call, as `Op.choose` got it."""
    shapes = tuple(None if x is None else tuple(x.shape) for x in inputs)
    first = inputs[0]
    assert first is not None
    small, odd, timed, call = _CASES[op](shapes, options)
    cases = [Case(call, it, options) for it in (small, odd, timed)]
    return Cases(cases[0], cases[1], cases[2], first.ndim == 4 and is_channels_last(first))


def _cut(shape: Shape, work_of_pixel: float = 0.0, least: int = 16) -> Shape:
    """The shape with a batch, and then sides of at least `least`, so small that it keeps the limits."""
    pixels = min(LARGEST_NUMEL // max(shape[1], 1), LARGEST_WORK // max(int(work_of_pixel), 1))
    batch, channels, *sides = shape
    while len(sides) == 2 and math.prod(sides) > pixels and min(sides) // 4 * 2 >= least:
        sides = [side // 4 * 2 for side in sides]  # even ones stay even
    return (min(batch, max(pixels // max(math.prod(sides), 1), 1)), channels, *sides)


def _maps(call: Callable[..., Tensor]) -> Callable[..., Any]:
    """For an op on [N, C, ...] and perhaps a bias."""

    def cases(shapes: Shapes, options: Mapping[str, object]) -> tuple[Any, ...]:
        x = shapes[0]
        assert x is not None

        def with_bias(shape: Shape) -> Shapes:
            return (shape,) if len(shapes) == 1 else (shape, (shape[1],))

        k = options.get("kernel_size", 1)
        assert isinstance(k, int)
        small = with_bias((4, 4, *[4 * k] * (len(x) - 2)))
        odd = with_bias((3, 5, *[7 * k, 3 * k + 1, 3][: len(x) - 2]))
        return small, odd, with_bias(_cut(x, least=max(16, k))), lambda name, *tensors: call(name, options, *tensors)

    return cases


def _bias_act(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(name: str, options: Mapping[str, Any], x: Tensor, bias: Tensor | None = None) -> Tensor:
        act = ACTS[options.get("act", LRELU)]
        slope, gain = options.get("negative_slope", 0.2), options.get("gain", 1.0)
        return function(x, bias, act, slope, gain, backend=name)

    return _maps(call)


def _conv(transposed: bool) -> Callable[..., Any]:
    def cases(shapes: Shapes, options: Mapping[str, object]) -> tuple[Any, ...]:
        x, w = shapes[:2]
        assert x is not None and w is not None
        geometry = options.get("geometry")
        if not isinstance(geometry, Geometry):
            geometry = Geometry((1, 1), (w[2] // 2, w[3] // 2), (1, 1), transposed, (0, 0), 1)
        g, taps = geometry.groups, w[2:]
        reach = [d * (k - 1) for d, k in zip(geometry.dilation, taps, strict=True)]
        # The kernel must fit in; from the result of a transposed convolution, padding must leave something.
        least = [max(r, -((r - 2 * p) // s)) for r, p, s in zip(reach, geometry.padding, geometry.stride, strict=True)]

        def sized(n: int, i: int, o: int, height: int, width: int) -> Shapes:
            weight = (g * i, o, *taps) if transposed else (g * o, i, *taps)
            return (n, g * i, height + least[0], width + least[1]), weight

        def call(name: str, x: Tensor, w: Tensor) -> Tensor:
            if transposed:
                rest = (geometry.output_padding, g, geometry.dilation)
                return conv_transpose2d(x, w, None, geometry.stride, geometry.padding, *rest, backend=name)
            return conv2d(x, w, None, geometry.stride, geometry.padding, geometry.dilation, g, backend=name)

        if len(x) == 3:
            x = (1, *x)
        of_pixel = math.prod(w) / g / (1 if transposed else math.prod(geometry.stride))
        timed = _cut(x, of_pixel, max(16, *(it + 1 for it in least))), w
        return sized(2, 2, 4, 4, 4), sized(3, 3, 5, 7, 2), timed, call

    return cases


def _scaled(function: Callable[..., Tensor], smaller: bool) -> Callable[..., Any]:
    def cases(shapes: Shapes, options: Mapping[str, Any]) -> tuple[Any, ...]:
        x, w = shapes[:2]
        assert x is not None and w is not None
        act, slope = ACTS[options.get("act", 0)], options.get("negative_slope", 0.2)

        def call(name: str, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
            return function(x, w, bias, act, slope, options.get("gain", 1.0), backend=name)

        odd = (3, 5, 6, 2) if smaller else (3, 5, 3, 7)
        of_pixel = math.prod(w) * (1 if smaller else 4)
        timed = (_cut(x, of_pixel), w, None if len(shapes) < 3 or shapes[2] is None else (w[0],))
        return ((2, 4, 4, 4), (4, 4, 3, 3), (4,)), (odd, (7, 5, 3, 3), (7,)), timed, call

    return cases


def _attention(shapes: Shapes, options: Mapping[str, object]) -> tuple[Any, ...]:
    q, k, v = shapes
    assert q is not None and k is not None and v is not None

    def sized(batch: int, heads: int, n: int, m: int) -> Shapes:
        return (batch, heads, n, q[-1]), (batch, heads, m, q[-1]), (batch, heads, m, v[-1])

    def call(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, backend=name)

    batch = math.prod(q[:-2])
    batch = min(batch, max(LARGEST_NUMEL // (q[-2] * k[-2]), 1))
    return sized(1, 2, 16, 16), sized(1, 1, 37, 21), sized(1, batch, q[-2], k[-2]), call


def _norm(op: str) -> Callable[..., Any]:
    """For an op on [N, C, ...] and perhaps a weight; layer norm's may have several dimensions."""

    def cases(shapes: Shapes, options: Mapping[str, Any]) -> tuple[Any, ...]:
        x, last, groups = shapes[0], len(options.get("shape", "C")), options.get("groups", 1)
        assert x is not None

        def sized(*sizes: int) -> Shapes:
            of_x = sizes[: len(x)]
            weight = of_x[len(x) - last :] if op == "layer_norm" else of_x[1:2]
            return (of_x, weight) if len(shapes) > 1 else (of_x,)

        def call(name: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
            if op == "layer_norm":
                return layer_norm(x, x.shape[x.ndim - last :], weight, backend=name)
            if op == "group_norm":
                return group_norm(x, groups, weight, backend=name)
            return instance_norm(x, weight=weight, backend=name)

        more = (2,) * len(x)
        return sized(4, 2 * groups, 4, 4, *more), sized(3, 3 * groups, 7, 5, *more), sized(*_cut(x)), call

    return cases


def _affine_grid_sample(name: str, _: Any, x: Tensor) -> Tensor:
    """The images turned, and enlarged or made smaller, each by another angle; some of them beyond their borders."""
    angles = torch.linspace(0.3, 2.0, x.shape[0], dtype=torch.float64, device="cpu")
    cos, sin = 1.1 * angles.cos(), 0.9 * angles.sin()
    theta = torch.stack([cos, -sin, 0.2 * sin, sin, cos, -0.1 * cos], dim=1).view(-1, 2, 3)
    return affine_grid_sample(x, theta.to(x.device, accumulation_dtype(x)), backend=name)


_CASES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "pixel_norm": _maps(lambda name, _, x: pixel_norm(x, backend=name)),
    "minibatch_stddev": _maps(lambda name, _, x: minibatch_stddev(x, backend=name)),
    "avg_pool2d": _maps(lambda name, options, x: avg_pool2d(x, int(options.get("kernel_size", 2)), backend=name)),
    "affine_grid_sample": _maps(_affine_grid_sample),
    "bias_act": _bias_act(bias_act),
    "bias_act_pixel_norm": _bias_act(bias_act_pixel_norm),
    "conv2d": _conv(transposed=False),
    "conv_transpose2d": _conv(transposed=True),
    "upsample_conv2d": _scaled(upsample_conv2d, smaller=False),
    "conv2d_downsample": _scaled(conv2d_downsample, smaller=True),
    "scaled_dot_product_attention": _attention,
    **{name: _norm(name) for name in ("layer_norm", "group_norm", "instance_norm")},
}

MEASURED_OPS = tuple(_CASES)
