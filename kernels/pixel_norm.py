"""Pixel norm with both derivatives: bias_act_pixel_norm with a linear act, gain 1 and no bias.

Arguments and results are those of `bias_act_pixel_norm`.
"""

from __future__ import annotations

from torch import Tensor

from .bias_act_pixel_norm import (
    bias_act_pixel_norm_backward,
    bias_act_pixel_norm_forward,
    bias_act_pixel_norm_second_backward,
)

_LINEAR = (0, 1.0, 1.0)


def pixel_norm_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x r and r = (mean over C of x^2 + eps)^(-1/2), float32 [N, 1, ...]."""
    return bias_act_pixel_norm_forward(x, None, *_LINEAR, eps)


def pixel_norm_backward(dy: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """First backward: dx."""
    return bias_act_pixel_norm_backward(dy, y, r, *_LINEAR, False)[0]


def pixel_norm_second_backward(u: Tensor, dy: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Second backward: gdy and gx, from the cotangent u of dx."""
    return bias_act_pixel_norm_second_backward(u, dy, y, r, *_LINEAR, False)[:2]
