"""Minibatch standard deviation (Karras et al. 2018, "Progressive growing of GANs", section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops.backend import Op

OP = Op("minibatch_stddev")


def minibatch_stddev(x: Tensor, group_size: int = 4, num_features: int = 1, eps: float = 1e-8) -> Tensor:
    """Append maps that tell a discriminator how much the samples of a group differ.

    Sample i belongs to group i mod (N / group_size): the groups are strided. In each group the biased standard
    deviation over samples is taken for every channel and pixel, then averaged over the pixels and over the channels
    of each of `num_features` chunks; the average is appended as a constant channel to each sample of the group.

    Args:
        x: [N, C, H, W], any floating dtype.
        group_size: samples in a group; where N is not a multiple of it, the largest divisor of N below it is used.
        num_features: number of appended channels; it must divide C.
        eps: added to the variance, so that a group of equal samples has a finite derivative.

    Returns:
        [N, C + num_features, H, W], dtype of `x`. Differentiable to any order.

    Raises:
        ValueError: `x` is not 4-dimensional, `group_size` < 1, or `num_features` does not divide C.
    """
    if x.ndim != 4:
        raise ValueError(f"x: had {x.ndim} dimensions; it may be [N, C, H, W]")
    n, c, h, w = x.shape
    if group_size < 1:
        raise ValueError(f"group_size: was {group_size}; it may be 1 or more")
    if num_features < 1 or c % num_features:
        raise ValueError(f"num_features: was {num_features}; it may be a divisor of the {c} channels of x")
    group = next(g for g in range(min(group_size, max(n, 1)), 0, -1) if n % g == 0)
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = y.reshape(group, n // group, num_features, c // num_features, h, w)
    y = (y - y.mean(dim=0, keepdim=True)).square().mean(dim=0)
    y = torch.sqrt(y + eps).mean(dim=(2, 3, 4)).to(x.dtype)
    y = y.repeat(group, 1)[:, :, None, None].expand(n, num_features, h, w)
    return torch.cat([x, y], dim=1)
