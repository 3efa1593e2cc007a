"""The progressive networks of Karras et al. 2018, "Progressive growing of GANs", table 2 and appendix A.

A network is built for the resolution of a stage, with every level below it; a grown network loads the state of the
smaller one by name. The feature map at resolution r has min(2 `fmap_base` / r, `fmap_max`) channels.

The buffer `alpha` blends the newest level with the one below: 0 is the old resolution alone, 1 the new one. The blend
is computed only if `fade` is set, a Python constant of the step. `set_alpha` sets both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.models.hub import Pretrained
from fastgan.nn import EqualizedConv2d, EqualizedLinear, MinibatchStdDev
from fastgan.ops.arguments import is_channels_last


def _fmaps(resolution: int, fmap_base: int, fmap_max: int) -> int:
    return min(2 * fmap_base // resolution, fmap_max)


def _resolutions(resolution: int) -> list[int]:
    return [2**i for i in range(2, int(math.log2(resolution)) + 1)]


def _restore_fade(network: Progressive, _: object) -> None:
    """Set `fade` by the loaded `alpha`: the state may be from the middle of a growth."""
    network.set_alpha(network.alpha.item())


class Progressive(nn.Module):
    """Base of both networks: the resolution of a stage, its fade-in, and which toRGB/fromRGB layers it trains."""

    alpha: Tensor

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.fade = False
        self.register_buffer("alpha", torch.ones(()))
        self.register_load_state_dict_post_hook(_restore_fade)

    def set_alpha(self, alpha: float) -> None:
        """Blend the newest level in by `alpha`; at 1 it is used alone."""
        self.alpha.fill_(alpha)
        self.fade = alpha < 1.0 and self.resolution > 4

    def _freeze_idle(self, rgb: nn.ModuleDict) -> None:
        """Freeze the RGB layers that the stage does not use, two or more levels below the newest."""
        for size, layer in rgb.items():
            layer.requires_grad_(int(size) * 2 >= self.resolution)


class _GeneratorBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, fused_scale: bool) -> None:
        super().__init__()
        self.fused_scale = fused_scale
        up = "up" if fused_scale else "none"
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, resample=up, act="lrelu", normalize=True)
        self.conv2 = EqualizedConv2d(out_channels, out_channels, 3, act="lrelu", normalize=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x if self.fused_scale else ops.interpolate_nearest(x)))


class Generator(Progressive, Pretrained):
    """latent [N, latent] -> images [N, C, R, R], unbounded (the data's range is [-1, 1])."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        latent: int,
        fmap_base: int = 8192,
        fmap_max: int = 512,
        fused_scale: bool = True,
        fmaps_at: dict[str, int] | None = None,
    ) -> None:
        """`fmaps_at`: channels at each resolution instead of `fmap_base` and `fmap_max`, for imported networks."""
        super().__init__(resolution)
        self.latent = latent

        def fmaps(size: int) -> int:
            return fmaps_at[str(size)] if fmaps_at else _fmaps(size, fmap_base, fmap_max)

        # The authors divide the gain by 4, which gives this layer the scale of a convolution.
        self.input = EqualizedLinear(latent, fmaps(4) * 16, gain=math.sqrt(2.0) / 4.0)
        self.conv = EqualizedConv2d(fmaps(4), fmaps(4), 3, act="lrelu", normalize=True)
        self.blocks = nn.ModuleDict()
        self.to_rgb = nn.ModuleDict()
        for size in _resolutions(resolution):
            if size > 4:
                self.blocks[str(size)] = _GeneratorBlock(fmaps(size // 2), fmaps(size), fused_scale)
            self.to_rgb[str(size)] = EqualizedConv2d(fmaps(size), channels, 1, gain=1.0)
        self._freeze_idle(self.to_rgb)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.input(ops.pixel_norm(latent)).unflatten(1, (-1, 4, 4))
        x = self.conv(ops.bias_act_pixel_norm(x, None, "lrelu"))
        below = x
        for block in self.blocks.values():
            below, x = x, block(x)
        image = self.to_rgb[str(self.resolution)](x)
        if self.fade:
            old = ops.interpolate_nearest(self.to_rgb[str(self.resolution // 2)](below))
            image = torch.lerp(old, image, self.alpha.to(image.dtype))
        return image


class _DiscriminatorBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, fused_scale: bool) -> None:
        super().__init__()
        self.fused_scale = fused_scale
        down = "down" if fused_scale else "none"
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3, act="lrelu")
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, resample=down, act="lrelu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return x if self.fused_scale else ops.avg_pool2d(x)


class Discriminator(Progressive):
    """images [N, C, R, R] -> scores [N]."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        fmap_base: int = 8192,
        fmap_max: int = 512,
        fused_scale: bool = True,
    ) -> None:
        super().__init__(resolution)

        def fmaps(size: int) -> int:
            return _fmaps(size, fmap_base, fmap_max)

        self.from_rgb = nn.ModuleDict()
        self.blocks = nn.ModuleDict()
        for size in _resolutions(resolution)[::-1]:
            self.from_rgb[str(size)] = EqualizedConv2d(channels, fmaps(size), 1, act="lrelu")
            if size > 4:
                self.blocks[str(size)] = _DiscriminatorBlock(fmaps(size), fmaps(size // 2), fused_scale)
        self.stddev = MinibatchStdDev()
        self.conv = EqualizedConv2d(fmaps(4) + 1, fmaps(4), 3, act="lrelu")
        self.dense = EqualizedLinear(fmaps(4) * 16, fmaps(2), act="lrelu")
        self.output = EqualizedLinear(fmaps(2), 1, gain=1.0)
        self._freeze_idle(self.from_rgb)

    def _from_rgb(self, size: int, images: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        if channels == 1 and is_channels_last(self.conv.weight):
            # Strides of one channel may be those of either format, and after a 1x1 convolution all maps have them.
            images = images.reshape(n, height, width, 1).permute(0, 3, 1, 2)
        return self.from_rgb[str(size)](images)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self._from_rgb(self.resolution, images)
        for size, block in self.blocks.items():
            x = block(x)
            if self.fade and int(size) == self.resolution:
                old = self._from_rgb(self.resolution // 2, ops.avg_pool2d(images))
                x = torch.lerp(old, x, self.alpha.to(x.dtype))
        x = self.dense(self.conv(self.stddev(x)).flatten(1))
        return self.output(x).squeeze(1)
