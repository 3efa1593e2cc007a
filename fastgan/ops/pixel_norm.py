"""Pixelwise feature vector normalisation (Karras et al. 2018, "Progressive growing of GANs", section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops.backend import Op

OP = Op("pixel_norm")


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / sqrt(mean over channels of x^2 + eps).

    Args:
        x: [N, C, ...], any floating dtype; dimension 1 is the feature vector of a pixel.
        eps: added to the mean square.

    Returns:
        Same shape, dtype and memory format as `x`. Differentiable to any order.

    Raises:
        ValueError: `x` has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise ValueError(f"x: had {x.ndim} dimensions; it may be [N, C, ...]")
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)
