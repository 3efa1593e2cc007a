"""Modules over `fastgan.ops`."""

from fastgan.nn.attention import SelfAttention2d
from fastgan.nn.conversion import Conversion, convert, revert
from fastgan.nn.dry_run import PenaltyReport, report
from fastgan.nn.layers import (
    Activation,
    ConditionalBatchNorm2d,
    EqualizedConv2d,
    EqualizedLinear,
    Maxout,
    MinibatchStdDev,
    PixelNorm,
)
from fastgan.nn.lean import Conv2d
from fastgan.nn.spectral_norm import spectral_norm

__all__ = [
    "Activation",
    "ConditionalBatchNorm2d",
    "Conv2d",
    "Conversion",
    "EqualizedConv2d",
    "EqualizedLinear",
    "Maxout",
    "MinibatchStdDev",
    "PenaltyReport",
    "PixelNorm",
    "SelfAttention2d",
    "convert",
    "report",
    "revert",
    "spectral_norm",
]
