"""Pooling of `torch.nn.functional` whose second derivative sends no zeros backward; `avg_pool2d` has its own file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops import piecewise
from fastgan.ops.autograd import tracked
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import LEAN, Op
from fastgan.ops.dispatch.torch_private import adaptive_avg_pool2d_backward
from fastgan.ops.fallthrough import fall_through, foreign
from fastgan.ops.piecewise import Rule

_aten = torch.ops.aten
MAX_POOL2D = Op("max_pool2d", {"lean": LEAN})
ADAPTIVE_AVG_POOL2D = Op("adaptive_avg_pool2d", {"lean": LEAN})
ADAPTIVE_MAX_POOL2D = Op("adaptive_max_pool2d", {"lean": LEAN})

Ints = int | tuple[int, ...]


def empty_like_input(g: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    """Uninitialized memory in place of an op's input, of which a backward kernel reads shape and layout alone."""
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)


def layout_of(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _gather(t: Tensor, options: Any, indices: Tensor) -> Tensor:
    return t.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)


def _max_forward(x: Tensor, options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, indices = F.max_pool2d_with_indices(x, *options[:5])
    return y, (indices,)


def _max_cotangent(g: Tensor, options: Any, indices: Tensor) -> Tensor:
    kernel, stride, padding, dilation, ceil_mode, shape, layout = options
    like = empty_like_input(g, shape, layout)
    stride = kernel if stride is None else stride
    arguments = (kernel, stride, padding, dilation, ceil_mode)
    return _aten.max_pool2d_with_indices_backward(g, like, *map(_list, arguments[:4]), ceil_mode, indices)


def _list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


_MAX = Rule(_max_forward, _gather, _max_cotangent)


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """`torch.nn.functional.max_pool2d`, whose second derivative, which is zero, sends nothing backward.

    Args:
        input: [N, C, H, W] or [C, H, W]; what is not a plain tensor runs in torch's own function.
        kernel_size: as in torch, like `stride`, `padding`, `dilation` and `ceil_mode`.
        return_indices: return the indices of the maxima too; torch's own function.
        backend: "lean" or "torch".
    """
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    if foreign(input):
        return fall_through(MAX_POOL2D, max_pool2d, F.max_pool2d, (input,), *options, return_indices, backend=backend)
    if return_indices or MAX_POOL2D.choose(backend, input) != "lean" or not tracked(input):
        return F.max_pool2d(input, *options, return_indices)  # type: ignore[call-overload]
    return piecewise.apply(input, _MAX, (*options, input.shape, layout_of(input)))


def _adaptive_max_forward(x: Tensor, options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, indices = F.adaptive_max_pool2d_with_indices(x, options[0])
    return y, (indices,)


def _adaptive_max_cotangent(g: Tensor, options: Any, indices: Tensor) -> Tensor:
    return _aten.adaptive_max_pool2d_backward(g, empty_like_input(g, *options[1:]), indices)


_ADAPTIVE_MAX = Rule(_adaptive_max_forward, _gather, _adaptive_max_cotangent)


def adaptive_max_pool2d(
    input: Tensor, output_size: Any, return_indices: bool = False, *, backend: str | None = None
) -> Any:
    """`torch.nn.functional.adaptive_max_pool2d`, whose second derivative sends nothing backward; see `max_pool2d`."""
    op, options = ADAPTIVE_MAX_POOL2D, (output_size, return_indices)
    if foreign(input):
        return fall_through(op, adaptive_max_pool2d, F.adaptive_max_pool2d, (input,), *options, backend=backend)
    if return_indices or op.choose(backend, input) != "lean" or not tracked(input):
        return F.adaptive_max_pool2d(input, *options)  # type: ignore[call-overload]
    return piecewise.apply(input, _ADAPTIVE_MAX, (output_size, input.shape, layout_of(input)))


def _mean(x: Tensor, options: Any) -> Tensor:
    return F.adaptive_avg_pool2d(x, options[0])


def _mean_cotangent(g: Tensor, options: Any) -> Tensor:
    return adaptive_avg_pool2d_backward(g, empty_like_input(g, *options[1:]))


_MEAN = Rule(lambda x, options: (_mean(x, options), ()), _mean, _mean_cotangent)


def adaptive_avg_pool2d(input: Tensor, output_size: Any, *, backend: str | None = None) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`, whose second derivative sends nothing backward; see `max_pool2d`."""
    op = ADAPTIVE_AVG_POOL2D
    if foreign(input):
        return fall_through(op, adaptive_avg_pool2d, F.adaptive_avg_pool2d, (input,), output_size, backend=backend)
    # To one pixel torch takes the mean, whose derivatives send nothing backward.
    one = output_size == 1 or output_size == (1, 1) or output_size == [1, 1]
    if one or adaptive_avg_pool2d_backward is None or op.choose(backend, input) != "lean" or not tracked(input):
        return F.adaptive_avg_pool2d(input, output_size)
    return piecewise.apply(input, _MEAN, (output_size, input.shape, layout_of(input)))
