"""The residual networks with self-attention of Zhang et al. 2018, "Self-attention generative adversarial networks".

Every convolution and linear layer of both networks has spectral norm. Channels double towards 4x4, up to 16 times
`width` or `max_width`. Both networks have an attention block where the feature map is `attention_at` pixels wide; the
default is 32, or half of an image that is smaller than 64.

Two things differ from the authors' code: weights have orthogonal and not Xavier initialization, and the shortcut of the
discriminator's last block, which keeps size and width, is a 1x1 convolution and not the identity.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.models.hub import Pretrained
from fastgan.nn import ConditionalBatchNorm2d, Conv2d, SelfAttention2d, spectral_norm


def _relu(x: Tensor) -> Tensor:
    return ops.bias_act(x, None, "relu")


def _widths(resolution: int, width: int, max_width: int) -> dict[int, int]:
    """Channels of the feature map at each resolution from 4 to `resolution`."""
    levels = int(math.log2(resolution)) - 1
    return {4 * 2**i: min(width * 2 ** min(levels - 1 - i, 4), max_width) for i in range(levels)}


def _orthogonal(module: nn.Conv2d | nn.Linear | nn.Embedding) -> nn.Module:
    """Orthogonal weights, zero biases, then spectral norm: all singular values start at 1."""
    nn.init.orthogonal_(module.weight)
    if not isinstance(module, nn.Embedding) and module.bias is not None:
        nn.init.zeros_(module.bias)
    return spectral_norm(module)


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True) -> nn.Module:
    return _orthogonal(Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias))


class _GeneratorBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(in_channels, num_classes)
        self.conv1 = _conv(in_channels, out_channels, bias=False)  # batch norm follows
        self.norm2 = ConditionalBatchNorm2d(out_channels, num_classes)
        self.conv2 = _conv(out_channels, out_channels)
        self.shortcut = _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        y = self.conv1(ops.interpolate_nearest(F.relu(self.norm1(x, labels))))
        y = self.conv2(F.relu(self.norm2(y, labels)))
        # A 1x1 convolution commutes with the upsampling and costs a quarter before it.
        return y + ops.interpolate_nearest(self.shortcut(x))


class Generator(nn.Module, Pretrained):
    """latent [N, latent], labels int64 [N] (when `num_classes`) -> images [N, C, R, R] in [-1, 1]."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        latent: int,
        width: int,
        max_width: int,
        attention_at: int | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.latent = latent
        widths = _widths(resolution, width, max_width)
        attention_at = attention_at or min(32, resolution // 2)
        self.input = _orthogonal(nn.Linear(latent, widths[4] * 16))
        self.blocks = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        for size in list(widths)[1:]:
            self.blocks[str(size)] = _GeneratorBlock(widths[size // 2], widths[size], num_classes)
        self.attention[str(attention_at)] = SelfAttention2d(widths[attention_at])
        self.norm = nn.BatchNorm2d(widths[resolution])
        self.output = _conv(widths[resolution], channels)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.input(latent).unflatten(1, (-1, 4, 4))
        if "4" in self.attention:
            x = self.attention["4"](x)
        for size, block in self.blocks.items():
            x = block(x, labels)
            if size in self.attention:
                x = self.attention[size](x)
        return torch.tanh(self.output(F.relu(self.norm(x))))


class _DiscriminatorBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.down = down
        self.conv1 = _conv(in_channels, out_channels)
        self.conv2 = _conv(out_channels, out_channels)
        self.shortcut = _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(_relu(self.conv1(x if self.first else _relu(x))))
        if self.down:
            return ops.avg_pool2d(y) + self.shortcut(ops.avg_pool2d(x))
        return y + self.shortcut(x)


class Discriminator(nn.Module):
    """images [N, C, R, R], labels int64 [N] (when `num_classes`) -> scores [N].

    Classes enter by projection: the inner product of the features with an embedding of the label is added to the score
    (Miyato and Koyama 2018).
    """

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        width: int,
        max_width: int,
        attention_at: int | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        # A block has the width that belongs to the size of its input.
        widths = _widths(resolution, width, max_width)
        attention_at = attention_at or min(32, resolution // 2)
        self.blocks = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        before, size = channels, resolution
        while size > 4:
            size //= 2
            after = widths[2 * size]
            self.blocks[str(size)] = _DiscriminatorBlock(before, after, down=True, first=2 * size == resolution)
            if size == attention_at:
                self.attention[str(size)] = SelfAttention2d(after)
            before = after
        self.last = _DiscriminatorBlock(before, widths[4], down=False)
        self.output = _orthogonal(nn.Linear(widths[4], 1))
        self.embedding = _orthogonal(nn.Embedding(num_classes, widths[4])) if num_classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = images
        for size, block in self.blocks.items():
            x = block(x)
            if size in self.attention:
                x = self.attention[size](x)
        features = _relu(self.last(x)).sum(dim=(2, 3))
        score = self.output(features).squeeze(1)
        if self.embedding is not None:
            score = score + (self.embedding(labels) * features).sum(dim=1)
        return score
