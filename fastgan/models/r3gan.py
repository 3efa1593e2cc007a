"""The networks of Huang et al. 2024, "The GAN is dead; long live the GAN! A modern baseline GAN" (configuration E).

Generator and discriminator mirror each other: two residual blocks at each resolution, without normalization, and a
change of scale by bilinear interpolation between them, with a 1x1 convolution where the width changes. A block widens
(1x1), convolves 16 channels at a time (3x3, grouped) and narrows (1x1). The last convolution of a block starts at zero
and the others are scaled down with the number of blocks (Zhang et al. 2019, "Fixup initialization"), which is what
keeps a network without normalization stable.

Channels double towards 4x4 from `width`, up to `max_width`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.models.hub import Pretrained
from fastgan.nn import Conv2d

_BLOCKS = 2  # of a resolution
_EXPANSION = 2
_GROUP = 16
_SLOPE = 0.2


def _widths(resolution: int, width: int, max_width: int) -> dict[int, int]:
    """Channels at 4, 8, ..., resolution."""
    levels = int(math.log2(resolution)) - 1
    return {4 * 2**i: min(width * 2 ** (levels - 1 - i), max_width) for i in range(levels)}


def _initialized(layer: nn.Conv2d | nn.Linear, gain: float) -> nn.Module:
    """Weights of N(0, gain^2 / fan in); no bias where there is one."""
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _conv(in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1, gain: float = 1.0) -> nn.Module:
    layer = Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
    return _initialized(layer, gain)


class _Block(nn.Module):
    """x + narrow(act(grouped(act(widen(x))))), with a bias before each activation.

    Args:
        channels: of x.
        blocks: residual blocks of the network; those before and after it add up.
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        hidden = _EXPANSION * channels
        # Of Fixup: blocks^(-1 / (2 m - 2)) for the m = 3 layers of a branch, and leaky ReLU's gain.
        gain = math.sqrt(2.0 / (1.0 + _SLOPE**2)) * blocks**-0.25
        self.widen = _conv(channels, hidden, gain=gain)
        self.bias1 = nn.Parameter(torch.zeros(hidden))
        self.grouped = _conv(hidden, hidden, 3, groups=hidden // math.gcd(hidden, _GROUP), gain=gain)
        self.bias2 = nn.Parameter(torch.zeros(hidden))
        self.narrow = _conv(hidden, channels, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.bias_act(self.widen(x), self.bias1, "lrelu", _SLOPE)
        y = ops.bias_act(self.grouped(y), self.bias2, "lrelu", _SLOPE)
        return x + self.narrow(y)


def _stage(channels: int, levels: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(channels, _BLOCKS * levels) for _ in range(_BLOCKS)))


def _transition(in_channels: int, out_channels: int) -> nn.Module:
    """A 1x1 convolution commutes with the interpolation, and is computed at the smaller size."""
    return nn.Identity() if in_channels == out_channels else _conv(in_channels, out_channels)


class Generator(nn.Module, Pretrained):
    """latent [N, latent] -> images [N, C, R, R], unbounded (the data's range is [-1, 1])."""

    def __init__(self, *, resolution: int, channels: int, latent: int, width: int, max_width: int) -> None:
        super().__init__()
        self.latent = latent
        widths = _widths(resolution, width, max_width)
        # A 4x4 feature map that is learned, each channel times a linear function of the latent vector.
        self.basis = nn.Parameter(torch.randn(widths[4], 4, 4))
        self.modulation = _initialized(nn.Linear(latent, widths[4], bias=False), 1.0)
        self.transitions = nn.ModuleDict({str(s): _transition(widths[s // 2], widths[s]) for s in list(widths)[1:]})
        self.stages = nn.ModuleDict({str(size): _stage(w, len(widths)) for size, w in widths.items()})
        self.output = _conv(widths[resolution], channels)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.basis * self.modulation(latent)[:, :, None, None]
        for size, stage in self.stages.items():
            if size in self.transitions:
                x = F.interpolate(self.transitions[size](x), scale_factor=2, mode="bilinear", align_corners=False)
            x = stage(x)
        return self.output(x)


class Discriminator(nn.Module):
    """images [N, C, R, R] -> scores [N]."""

    def __init__(self, *, resolution: int, channels: int, width: int, max_width: int) -> None:
        super().__init__()
        widths = _widths(resolution, width, max_width)
        sizes = sorted(widths, reverse=True)
        self.input = _conv(channels, widths[resolution])
        self.stages = nn.ModuleDict({str(size): _stage(widths[size], len(widths)) for size in sizes})
        self.transitions = nn.ModuleDict({str(s): _transition(widths[2 * s], widths[s]) for s in sizes[1:]})
        # A 4x4 convolution of each channel with itself alone, then a linear layer.
        self.head = _initialized(Conv2d(widths[4], widths[4], 4, groups=widths[4], bias=False), 1.0)
        self.output = _initialized(nn.Linear(widths[4], 1), 1.0)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.input(images)
        for size, stage in self.stages.items():
            if size in self.transitions:
                x = self.transitions[size](ops.avg_pool2d(x))  # bilinear interpolation at half the size
            x = stage(x)
        return self.output(self.head(x).flatten(1)).squeeze(1)
