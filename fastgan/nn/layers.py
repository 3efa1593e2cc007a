"""The layers of the networks: thin modules over `fastgan.ops` and `torch.nn`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn.shared_weights import scaled


class Activation(nn.Module):
    """`ops.bias_act` without a bias, which does not compute second derivatives that are zero.

    Args:
        act: linear, relu, lrelu, tanh, sigmoid or silu.
        negative_slope: of lrelu.
    """

    def __init__(self, act: str, negative_slope: float = 0.2) -> None:
        super().__init__()
        self.act = act
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return ops.bias_act(x, None, self.act, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{self.act}, negative_slope={self.negative_slope}" if self.act == "lrelu" else self.act


class EqualizedLinear(nn.Module):
    """Linear layer with equalized learning rate (Karras et al. 2018, section 4.1), followed by an activation.

    Weights are drawn from N(0, 1) and scaled by gain / sqrt(in_features) in every forward pass. As Adam's step does not
    depend on the scale of the gradient, layers of every size learn at the same speed.
    [..., in_features] -> [..., out_features].

    Args:
        in_features: fan in.
        out_features: size of the result.
        gain: numerator of the scale.
        act: an activation of `ops.bias_act`.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = math.sqrt(2.0), act: str = "linear") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = gain / math.sqrt(in_features)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        weight = scaled(self.weight, self.scale)
        if self.act == "linear":
            return ops.linear(x, weight, self.bias)
        y = ops.linear(x, weight)
        if y.ndim == 2:
            return ops.bias_act(y, self.bias, self.act)
        return ops.bias_act(y.reshape(-1, y.shape[-1]), self.bias, self.act).view(y.shape)


class EqualizedConv2d(nn.Module):
    """Convolution of stride 1 and "same" padding with equalized learning rate (see `EqualizedLinear`).

    [N, in_channels, H, W] -> [N, out_channels, H, W], or without N.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: odd.
        gain: numerator of the scale, whose denominator is sqrt(in_channels kernel_size^2).
        resample: "up" doubles the size before the convolution, "down" halves it by averaging after it, in one strided
            convolution (`ops.upsample_conv2d`, `ops.conv2d_downsample`) for which `kernel_size` must be 3; or "none".
        act: an activation of `ops.bias_act`, in one pass with the bias.
        normalize: pixel norm after the activation, in the same pass (`ops.bias_act_pixel_norm`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        gain: float = math.sqrt(2.0),
        resample: str = "none",
        act: str = "linear",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if resample not in ("none", "up", "down"):
            raise ValueError(f"resample must be none, up or down, got {resample!r}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if resample != "none" and kernel_size != 3:
            raise ValueError(f"kernel_size must be 3 with resample {resample!r}, got {kernel_size}")
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = gain / math.sqrt(in_channels * kernel_size**2)
        self.padding = kernel_size // 2
        self.resample = resample
        self.act = act
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self.forward(x[None])[0]
        weight = scaled(self.weight, self.scale, cast=self.resample == "none")
        bias_only = self.act == "linear" and not self.normalize
        bias = self.bias if bias_only else None
        if self.resample == "up":
            x = ops.upsample_conv2d(x, weight, bias)
        elif self.resample == "down":
            x = ops.conv2d_downsample(x, weight, bias)
        else:
            x = ops.conv2d(x, weight, bias, padding=self.padding)
        if bias_only:
            return x
        return (ops.bias_act_pixel_norm if self.normalize else ops.bias_act)(x, self.bias, self.act)


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
    """The largest of `pieces` linear maps for each output (Goodfellow et al. 2013): [N, in] -> [N, out]."""

    def __init__(self, in_features: int, out_features: int, pieces: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features * pieces)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(1, (-1, self.pieces)).amax(dim=2)


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with a gain and a bias for each class (Dumoulin et al. 2017); with 0 classes, plain batch norm.

    x: [N, C, H, W] -> the same; labels: int64 [N] in [0, num_classes), or None when `num_classes` is 0.
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
