"""Scaled dot-product attention that can be differentiated twice (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgan.ops.backend import Op

OP = Op("scaled_dot_product_attention")


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(scale * query key^T) value, in plain matrix products: differentiable to any order on any device.

    `torch.nn.functional.scaled_dot_product_attention` raises under a gradient penalty on every fused backend;
    this form does not, and stores arrays of N x M.

    Args:
        query: [..., N, d]; key: [..., M, d]; value: [..., M, dv]; one floating dtype; leading dimensions broadcast.
        scale: factor of the logits; 1 / sqrt(d) when None.

    Returns:
        [..., N, dv].

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key: had feature size {key.shape[-1]}; it may be {query.shape[-1]}, as in query")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value: had length {value.shape[-2]}; it may be {key.shape[-2]}, as in key")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    logits = (query * scale) @ key.transpose(-2, -1)
    return torch.softmax(logits, dim=-1) @ value
