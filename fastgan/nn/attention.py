"""Self-attention over the positions of a feature map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgan import ops


def _identity(module: nn.Module) -> nn.Module:
    return module


class SelfAttention2d(nn.Module):
    """The block of SAGAN: x + gamma * attention(x), with gamma learned from 0 (Zhang et al. 2018, section 3).

    Queries and keys have C/8 features, values C/2; logits are not scaled. Keys and values are max-pooled 2x2, as in
    the authors' code, so that N = H W queries meet M = N / 4 keys.

    Args:
        channels: C, at least 8.
        pool: pool keys and values.
        normalized: spectral norm on the four 1x1 projections.

    Shapes: [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, channels: int, pool: bool = True, normalized: bool = True) -> None:
        super().__init__()
        if channels < 8:
            raise ValueError(f"channels must be at least 8, got {channels}")
        wrap: Callable[[nn.Module], nn.Module] = spectral_norm if normalized else _identity
        self.query = wrap(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.key = wrap(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.value = wrap(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.output = wrap(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(()))
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        key, value = self.key(x), self.value(x)
        if self.pool:
            key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)

        def rows(t: Tensor) -> Tensor:
            return t.flatten(2).transpose(1, 2)

        attended = ops.scaled_dot_product_attention(rows(self.query(x)), rows(key), rows(value), scale=1.0)
        return x + self.gamma * self.output(attended.transpose(1, 2).reshape(n, -1, h, w))
