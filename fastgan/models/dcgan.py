"""The deep convolutional networks of Radford et al. 2015, "Unsupervised representation learning with DCGANs".

Each 4x4 convolution of stride 2 halves (discriminator) or doubles (generator) the size, from the image down to 4x4.
Channels double towards 4x4, up to `max_width`. The kernels are 4x4 as in the authors' Torch code and in Arjovsky et al.
2017; figure 1 of the paper and its Theano code have 5x5. Latents are Gaussian; in the paper they are uniform.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from fastgan.models.hub import Pretrained
from fastgan.nn import Activation, Conv2d


def _widths(resolution: int, width: int, max_width: int) -> list[int]:
    """Channels at resolution/2, resolution/4, ..., 4."""
    return [min(width * 2**i, max_width) for i in range(int(math.log2(resolution)) - 2)]


def _norm(channels: int, norm: str) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels)] if norm == "batch" else []


def _initialize(module: nn.Module) -> None:
    """N(0, 0.02) weights and N(1, 0.02) batch-norm gains, as in section 4."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Generator(nn.Module, Pretrained):
    """latent [N, latent] -> images [N, C, R, R] in [-1, 1]."""

    def __init__(
        self, *, resolution: int, channels: int, latent: int, width: int, max_width: int, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.latent = latent
        bias = norm == "none"
        widths = _widths(resolution, width, max_width)[::-1]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], 4, bias=bias), *_norm(widths[0], norm)]
        for before, after in itertools.pairwise(widths):
            layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=bias), *_norm(after, norm)]
        layers += [nn.ReLU(), nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1)]
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.tanh(self.layers(latent[:, :, None, None]))


class Discriminator(nn.Module):
    """images [N, C, R, R] -> scores [N]. A critic with a gradient penalty needs `norm` "none"."""

    def __init__(self, *, resolution: int, channels: int, width: int, max_width: int, norm: str = "batch") -> None:
        super().__init__()
        widths = _widths(resolution, width, max_width)
        layers: list[nn.Module] = [Conv2d(channels, widths[0], 4, 2, 1), Activation("lrelu")]
        for before, after in itertools.pairwise(widths):
            layers += [
                Conv2d(before, after, 4, 2, 1, bias=norm == "none"),
                *_norm(after, norm),
                Activation("lrelu"),
            ]
        layers.append(Conv2d(widths[-1], 1, 4))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(images).flatten()
