"""Convolutions fused with a change of scale, and the two scale changes themselves.

Nearest-neighbour upsampling by 2 and 2x2 averaging are convolutions with a 2x2 box. Followed (or preceded) by a 3x3
convolution they make one 4x4 kernel: the sum of the 3x3 kernel at four offsets. One strided convolution then does the
work of both, with 4 multiply-adds instead of 9 for each output of the upsampling form, and 16 instead of 36 for the
downsampling form. Progressive GANs were published with this form in the authors' code (Karras et al. 2018, appendix A).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgan.ops.backend import Op

for _name in ("upsample_conv2d", "conv2d_downsample", "avg_pool2d", "interpolate_nearest"):
    Op(_name)


def _box_kernel(w: Tensor) -> Tensor:
    """The 4x4 kernel that is `w` [O, I, 3, 3] convolved with a 2x2 box of ones."""
    w = F.pad(w, (1, 1, 1, 1))
    return w[..., 1:, 1:] + w[..., :-1, 1:] + w[..., 1:, :-1] + w[..., :-1, :-1]


def _check(x: Tensor, w: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: had {x.ndim} dimensions; it may be [N, I, H, W]")
    if w.ndim != 4 or w.shape[2:] != (3, 3) or w.shape[1] != x.shape[1]:
        raise ValueError(f"w: had shape {tuple(w.shape)}; it may be [O, {x.shape[1]}, 3, 3]")


def upsample_conv2d(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(interpolate_nearest(x, 2), w, bias, padding=1) as one transposed convolution of stride 2.

    Args:
        x: [N, I, H, W]; w: [O, I, 3, 3]; bias: [O] or None; one floating dtype.

    Returns:
        [N, O, 2H, 2W].

    Raises:
        ValueError: `x` is not 4-dimensional, or `w` does not fit it.
    """
    _check(x, w)
    # A transposed convolution mirrors its kernel, hence the flip; its weight is [I, O, 4, 4].
    kernel = _box_kernel(w).flip(2, 3).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def conv2d_downsample(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """avg_pool2d(conv2d(x, w, bias, padding=1), 2) as one convolution of stride 2.

    Args:
        x: [N, I, H, W] with even H and W; w: [O, I, 3, 3]; bias: [O] or None; one floating dtype.

    Returns:
        [N, O, H/2, W/2].

    Raises:
        ValueError: `x` is not 4-dimensional or has an odd size, or `w` does not fit it.
    """
    _check(x, w)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: had size {tuple(x.shape[2:])}; height and width may be even")
    return F.conv2d(x, _box_kernel(w) * 0.25, bias, stride=2, padding=1)


def avg_pool2d(x: Tensor, kernel_size: int = 2) -> Tensor:
    """Mean over non-overlapping `kernel_size` squares: [N, C, H, W] -> [N, C, H/k, W/k]."""
    return F.avg_pool2d(x, kernel_size)


def interpolate_nearest(x: Tensor, scale_factor: int = 2) -> Tensor:
    """Repeat each pixel `scale_factor` times in both directions: [N, C, H, W] -> [N, C, sH, sW]."""
    return F.interpolate(x, scale_factor=scale_factor, mode="nearest")
