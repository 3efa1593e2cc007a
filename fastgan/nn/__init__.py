"""Modules over `fastgan.ops`."""

from fastgan.nn.attention import SelfAttention2d
from fastgan.nn.layers import (
    Activation,
    ConditionalBatchNorm2d,
    Conv2d,
    EqualizedConv2d,
    EqualizedLinear,
    Maxout,
    MinibatchStdDev,
    PixelNorm,
)
from fastgan.nn.spectral_norm import spectral_norm

__all__ = [
    "Activation",
    "ConditionalBatchNorm2d",
    "Conv2d",
    "EqualizedConv2d",
    "EqualizedLinear",
    "Maxout",
    "MinibatchStdDev",
    "PixelNorm",
    "SelfAttention2d",
    "spectral_norm",
]
