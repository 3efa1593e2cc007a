"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn.spectral_norm import spectral_norm


class SelfAttention2d(nn.Module):
    """The attention block of SAGAN: x + gamma * attention(x), gamma learned from 0 (Zhang et al. 2018, section 3).

    Queries and keys have C / 8 features, values C / 2; logits are not scaled. Keys and values are max-pooled 2x2, as in
    the authors' code, so that N = H W queries attend to M = N / 4 keys. [N, C, H, W] -> [N, C, H, W].

    Args:
        channels: C, at least 8.
        pool: whether to pool keys and values.
        normalized: whether the four 1x1 projections have spectral norm.
    """

    def __init__(self, channels: int, pool: bool = True, normalized: bool = True) -> None:
        super().__init__()
        if channels < 8:
            raise ValueError(f"channels must be at least 8, got {channels}")

        def projection(inputs: int, outputs: int) -> nn.Module:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            return spectral_norm(conv) if normalized else conv

        self.query = projection(channels, channels // 8)
        self.key = projection(channels, channels // 8)
        self.value = projection(channels, channels // 2)
        self.output = projection(channels // 2, channels)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key(x), self.value(x)
        if self.pool:
            key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)

        def rows(t: Tensor) -> Tensor:
            return t.flatten(2).transpose(1, 2)

        attended = ops.scaled_dot_product_attention(rows(self.query(x)), rows(key), rows(value), scale=1.0)
        return x + self.gamma * self.output(attended.transpose(1, 2).unflatten(2, x.shape[2:]))
