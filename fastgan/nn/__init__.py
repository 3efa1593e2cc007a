"""Modules over `fastgan.ops`."""

from fastgan.nn.attention import SelfAttention2d
from fastgan.nn.layers import (
    ConditionalBatchNorm2d,
    EqualizedConv2d,
    EqualizedLinear,
    Maxout,
    MinibatchStdDev,
    PixelNorm,
)

__all__ = [
    "ConditionalBatchNorm2d",
    "EqualizedConv2d",
    "EqualizedLinear",
    "Maxout",
    "MinibatchStdDev",
    "PixelNorm",
    "SelfAttention2d",
]
