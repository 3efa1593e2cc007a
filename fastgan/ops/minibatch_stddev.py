"""Minibatch standard deviation (Karras et al. 2018, "Progressive growing of GANs", section 3).

At each channel and pixel let d = x - <x> and sigma = (<d^2> + eps)^(1/2), where <.> is the mean over the G samples of a
group. The map is the mean of sigma over the K = C / num_features H W elements of a chunk. With t the sum of the map's
gradient over samples and pixels, divided by K, and u the cotangent of dx:

    dx = dy + t d / (G sigma)                                              first backward
    gdy = u, and for the map: the sum over the chunk of <u d> / sigma, divided by K
    gx = t / (G sigma) (u - <u> - d <u d> / sigma^2)                       second backward
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.arguments import accumulation_dtype, dense, dense_like, require_eps, require_feature_map
from fastgan.ops.autograd import SecondBackward, form_tag, needs_gradient, non_leaf, tracked
from fastgan.ops.dispatch.backend import Op, by_size, in_transform
from fastgan.ops.dispatch.kernel_registry import kernel_functions, kernel_implementations
from fastgan.ops.fallthrough import fall_through, foreign


def _unsupported_options(eps: float = 1.0, **options: object) -> str | None:
    return None if eps > 0 else "it supports only a positive eps"


OP = Op("minibatch_stddev", kernel_implementations("minibatch_stddev", _unsupported_options), classify=by_size)


def minibatch_stddev(
    x: Tensor, group_size: int = 4, num_features: int = 1, eps: float = 1e-8, *, backend: str | None = None
) -> Tensor:
    """Append channels that show a discriminator how much the samples of a group differ.

    Sample i belongs to group i mod (N / group_size): the groups are strided. In each group the biased standard
    deviation over samples is computed for every channel and pixel, then averaged over the pixels and over the channels
    of each of `num_features` chunks; the average is appended as a constant channel to each sample of the group.

    Args:
        x: [N, C, H, W], any floating-point dtype.
        group_size: samples in a group; where N is not a multiple of it, the largest divisor of N below it is used.
        num_features: number of appended channels; it must divide C.
        eps: added to the variance, so that a group of equal samples has a finite derivative.
        backend: as in `fastgan.ops.use_backend`.

    Returns:
        [N, C + num_features, H, W], dtype of `x`. It has first and second derivatives; a third raises, except with
        backend="torch".

    Raises:
        TypeError: the dtype of `x` is not floating-point, or an argument has the wrong type.
        ValueError: `x` is not 4-dimensional, `group_size` < 1, `num_features` does not divide C, or `eps` is negative.
    """
    if foreign(x) and not in_transform():
        return fall_through(OP, minibatch_stddev, _plain, (x,), group_size, num_features, eps, backend=backend)
    _require_arguments(x, group_size, num_features, eps)
    group = _group(x, group_size)
    name = OP.choose(backend, x, eps=eps)
    if name == "torch":
        return reference(x, group, num_features, eps)
    settings = _Settings(kernel_functions("minibatch_stddev", name), group, num_features, eps)
    x = dense(x)
    if not tracked(x):
        return settings.kernels.minibatch_stddev_forward(x, *settings[1:])
    return _MinibatchStddev.apply(non_leaf(x), settings)


def _require_arguments(x: Tensor, group_size: int, num_features: int, eps: float) -> None:
    require_feature_map(x)
    for argument, value in (("group_size", group_size), ("num_features", num_features)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{argument} must be an integer, got {value!r}")
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.ndim} dimensions")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if num_features < 1 or x.shape[1] % num_features:
        raise ValueError(f"num_features must be a divisor of the {x.shape[1]} channels of x, got {num_features}")
    require_eps(eps)


def _group(x: Tensor, group_size: int) -> int:
    n = x.shape[0]
    return next(g for g in range(min(group_size, max(n, 1)), 0, -1) if n % g == 0)


def _plain(x: Tensor, group_size: int, num_features: int, eps: float) -> Tensor:
    _require_arguments(x, group_size, num_features, eps)
    return reference(x, _group(x, group_size), num_features, eps)


def reference(x: Tensor, group: int, num_features: int, eps: float) -> Tensor:
    """Plain PyTorch, differentiable to any order; `group` divides the batch."""
    n, _, h, w = x.shape
    y = _split(x, group, num_features)
    y = (y - y.mean(dim=0, keepdim=True)).square().mean(dim=0)
    y = torch.sqrt(y + eps).mean(dim=(2, 3, 4)).to(x.dtype)
    y = y.repeat(group, 1)[:, :, None, None].expand(n, num_features, h, w)
    return torch.cat([x, y], dim=1)


class _Settings(NamedTuple):
    """Arguments of the Functions besides tensors; `kernels` has the functions of `PYTORCH_KERNELS`."""

    kernels: Any
    group: int
    num_features: int
    eps: float


class _MinibatchStddev(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: _Settings) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(form_tag(), x)
        ctx.settings = settings
        return settings.kernels.minibatch_stddev_forward(x, *settings[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return None, None
        _, x = ctx.saved_tensors
        return _MinibatchStddevBackward.apply(non_leaf(dense_like(dy, x)), x, ctx.settings)[0], None


class _MinibatchStddevBackward(Function):
    """Returns dx and t."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dx, t = settings.kernels.minibatch_stddev_backward(dy, x, *settings[1:])
        # As an output t connects the second backward to dy in the graph, so that a third derivative raises.
        ctx.save_for_backward(x, t)
        ctx.settings = settings
        return dx, t

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, _: Any) -> tuple[Any, ...]:
        if u is None:
            return None, None, None
        x, t = ctx.saved_tensors
        kernel, u = ctx.settings.kernels.minibatch_stddev_second_backward, non_leaf(dense_like(u, x))
        gdy, gx = SecondBackward.apply("minibatch_stddev", kernel, u, x, t, *ctx.settings[1:])
        return gdy, gx if needs_gradient(ctx, 1) else None, None


# The kernels' functions in plain PyTorch: the specification of what a kernel computes. F is num_features.


def forward(x: Tensor, group: int, num_features: int, eps: float) -> Tensor:
    """Returns [N, C + F, H, W] in the memory format of x: [N, C, H, W] (contiguous where x is in both)."""
    return dense_like(reference(x, group, num_features, eps), x)


def _split(x: Tensor, group: int, num_features: int) -> Tensor:
    """x as [G, N / G, F, C / F, H, W] in float32 at least; dimension 0 has the samples of a group."""
    n, c, h, w = x.shape
    return x.to(accumulation_dtype(x)).reshape(group, n // group, num_features, c // num_features, h, w)


def _deviation(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns d and sigma."""
    d = x - x.mean(dim=0, keepdim=True)
    return d, torch.sqrt(d.square().mean(dim=0, keepdim=True) + eps)


def backward(dy: Tensor, x: Tensor, group: int, num_features: int, eps: float) -> tuple[Tensor, Tensor]:
    """dy: [N, C + F, H, W] in x's memory format. Returns dx, like x, and t: [N / G, F], contiguous, float32."""
    c = x.shape[1]
    d, sigma = _deviation(_split(x, group, num_features), eps)
    t = _split(dy[:, c:], group, num_features).sum(dim=(0, 3, 4, 5)) / d[0, 0, 0].numel()
    dx = dy[:, :c] + (t[:, :, None, None, None] * d / (group * sigma)).reshape(x.shape)
    return dense_like(dx.to(x.dtype), x), t


def second_backward(
    u: Tensor, x: Tensor, t: Tensor, group: int, num_features: int, eps: float
) -> tuple[Tensor, Tensor]:
    """u: like x, the cotangent of dx. Returns gdy: [N, C + F, H, W] in x's memory format, and gx, like x."""
    n, _, h, w = x.shape
    d, sigma = _deviation(_split(x, group, num_features), eps)
    v = _split(u, group, num_features)
    v = v - v.mean(dim=0, keepdim=True)  # first, as all of a group have the same rounding error of <x> in d
    along = (v * d).mean(dim=0, keepdim=True)
    maps = (along / sigma).mean(dim=(0, 3, 4, 5)).to(x.dtype)
    maps = maps.repeat(group, 1)[:, :, None, None].expand(n, num_features, h, w)
    curvature = (v - d * along / sigma.square()) / (group * sigma)
    gx = (t[:, :, None, None, None] * curvature).reshape(x.shape)
    return dense_like(torch.cat([u, maps], dim=1), x), dense_like(gx.to(x.dtype), x)


PYTORCH_KERNELS = SimpleNamespace(
    minibatch_stddev_forward=forward,
    minibatch_stddev_backward=backward,
    minibatch_stddev_second_backward=second_backward,
)
