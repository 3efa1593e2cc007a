"""Pixel norm and its derivatives: bias_act_pixel_norm's kernels without a bias and an act."""

from __future__ import annotations

from torch import Tensor

from fastgan.kernels.bias_act_pixel_norm import (
    bias_act_pixel_norm_backward,
    bias_act_pixel_norm_forward,
    bias_act_pixel_norm_second_backward,
)

_LINEAR = (0, 1.0, 1.0)


def pixel_norm_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return bias_act_pixel_norm_forward(x, None, *_LINEAR, eps)


def pixel_norm_backward(dy: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return bias_act_pixel_norm_backward(dy, y, r, *_LINEAR, False)[0]


def pixel_norm_second_backward(u: Tensor, dy: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return bias_act_pixel_norm_second_backward(u, dy, y, r, *_LINEAR, False)[:2]
