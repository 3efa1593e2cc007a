"""Layers that the networks are made of; each is a thin module over `fastgan.ops` or `torch.nn`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops


class EqualizedLinear(nn.Module):
    """Linear layer with equalised learning rate: weights drawn from N(0, 1), scaled at run time by gain / sqrt(fan in).

    Karras et al. 2018, section 4.1. Adam's step does not depend on the gradient's scale, so layers of every size then
    learn at the same speed. [N, in_features] -> [N, out_features].
    """

    def __init__(self, in_features: int, out_features: int, gain: float = math.sqrt(2.0)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class EqualizedConv2d(nn.Module):
    """Convolution of stride 1 and same size with equalised learning rate (see `EqualizedLinear`).

    Args:
        resample: "up" doubles the size before the convolution, "down" halves it by averaging after it, both inside
            one strided convolution (`ops.upsample_conv2d`, `ops.conv2d_downsample`); they need `kernel_size` 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        gain: float = math.sqrt(2.0),
        resample: str = "none",
    ) -> None:
        super().__init__()
        if resample not in ("none", "up", "down"):
            raise ValueError(f"resample: was {resample!r}; it may be none, up or down")
        if resample != "none" and kernel_size != 3:
            raise ValueError(f"kernel_size: was {kernel_size}; it may be 3 with resample")
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = gain / math.sqrt(in_channels * kernel_size**2)
        self.padding = kernel_size // 2
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        if self.resample == "up":
            return ops.upsample_conv2d(x, weight, self.bias)
        if self.resample == "down":
            return ops.conv2d_downsample(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class PixelNorm(nn.Module):
    """`ops.pixel_norm` over dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.pixel_norm(x)


class MinibatchStdDev(nn.Module):
    """`ops.minibatch_stddev`: [N, C, H, W] -> [N, C + num_features, H, W]."""

    def __init__(self, group_size: int = 4, num_features: int = 1) -> None:
        super().__init__()
        self.group_size = group_size
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return ops.minibatch_stddev(x, self.group_size, self.num_features)


class Maxout(nn.Module):
    """Largest of `pieces` linear maps for each output (Goodfellow et al. 2013): [N, in] -> [N, out]."""

    def __init__(self, in_features: int, out_features: int, pieces: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features * pieces)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(1, (-1, self.pieces)).amax(dim=2)


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with a gain and a bias for each class (Dumoulin et al. 2017); a plain one without classes.

    x: [N, C, H, W]; labels: int64 [N] in [0, num_classes), or None when `num_classes` is 0.
    """

    def __init__(self, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=num_classes == 0)
        self.affine: nn.Embedding | None = None
        if num_classes:
            self.affine = nn.Embedding(num_classes, 2 * channels)
            with torch.no_grad():
                self.affine.weight[:, :channels] = 1.0
                self.affine.weight[:, channels:] = 0.0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.affine is None:
            return x
        gain, bias = self.affine(labels)[:, :, None, None].chunk(2, dim=1)
        return x * gain + bias
