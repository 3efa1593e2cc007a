"""Critics as public projects write them, in plain `torch.nn`: what `fastgan.nn.convert` is measured on.

Each is in the style of a published network, and has the layers that undo the saving of lean convolutions: in-place
rectifiers, average pooling, reflection padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

Norm = Callable[[nn.Module], nn.Module]


def _plain(module: nn.Module) -> nn.Module:
    return module


class ResidualBlock(nn.Module):
    """Rectifier, 3x3, rectifier, 3x3, and 2x2 averaging behind both paths (Gulrajani et al. 2017, appendix F).

    The first rectifier changes its input in place, as public reproductions have it, so the shortcut gets rectified
    images as well.
    """

    def __init__(self, inputs: int, outputs: int, down: bool, norm: Norm = _plain) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ReLU(inplace=True),
            norm(nn.Conv2d(inputs, outputs, 3, padding=1)),
            nn.ReLU(inplace=True),
            norm(nn.Conv2d(outputs, outputs, 3, padding=1)),
        )
        self.shortcut = norm(nn.Conv2d(inputs, outputs, 1)) if down or inputs != outputs else nn.Identity()
        self.down = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return self.down(y) + self.down(self.shortcut(x))


class Sum(nn.Module):
    """Sum over the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


def residual(width: int = 64) -> nn.Module:
    """32 px, as the CIFAR critic of WGAN-GP, half as wide."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        ResidualBlock(width, width, True),
        ResidualBlock(width, width, True),
        ResidualBlock(width, width, False),
        ResidualBlock(width, width, False),
        nn.ReLU(inplace=True),
        Sum(),
        nn.Linear(width, 1),
    )


def mlp(width: int = 512) -> nn.Module:
    """28 px in grey, three hidden layers, as the multilayer perceptrons of many introductions."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (28 * 28, width, width):
        layers += [nn.Linear(inputs, width), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Linear(width, 1))


class Blur(nn.Module):
    """[1, 2, 1] in both directions, reflected at the border (Zhang 2019): a convolution in groups of one channel."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.pad = nn.ReflectionPad2d(1)
        self.filter = nn.Conv2d(channels, channels, 3, stride, groups=channels, bias=False)
        self.filter.weight = nn.Parameter(torch.outer(row, row).repeat(channels, 1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(self.pad(x))


class BlurredBlock(nn.Module):
    """3x3, 3x3, a filter before each change of size, and a shortcut of 1x1, as in StyleGAN2's discriminator."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            Blur(inputs),
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.shortcut = nn.Sequential(Blur(inputs, 2), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.shortcut(x)) * 0.5**0.5


def blurred(width: int = 16) -> nn.Module:
    """128 px down to 4 px."""
    widths = [width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
    blocks = [BlurredBlock(a, b) for a, b in itertools.pairwise(widths)]
    first = [nn.Conv2d(3, width, 1), nn.LeakyReLU(0.2, inplace=True)]
    last = [nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.LeakyReLU(0.2, inplace=True), nn.Flatten()]
    return nn.Sequential(*first, *blocks, *last, nn.Linear(16 * widths[-1], 1))


class AttentionBlock(nn.Module):
    """Attention over the pixels with softmax and two products, as in BigGAN (Brock et al. 2019)."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.query = norm(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.key = norm(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.value = norm(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.output = norm(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.pool = nn.MaxPool2d(2)
        self.gamma = nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key, value = self.pool(self.key(x)).flatten(2), self.pool(self.value(x)).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        attended = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.output(attended)


def biggan(width: int = 64) -> nn.Module:
    """32 px, spectral norm in every layer, attention at 16 px."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, width, 3, padding=1)),
        ResidualBlock(width, width, True, spectral_norm),
        AttentionBlock(width, spectral_norm),
        ResidualBlock(width, width, True, spectral_norm),
        ResidualBlock(width, width, False, spectral_norm),
        ResidualBlock(width, width, False, spectral_norm),
        nn.ReLU(inplace=True),
        Sum(),
        spectral_norm(nn.Linear(width, 1)),
    )


# Name -> the critic, and the images of a training step.
CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "residual": (residual, (32, 3, 32, 32)),
    "mlp": (mlp, (256, 1, 28, 28)),
    "blurred": (blurred, (4, 3, 128, 128)),
    "biggan": (biggan, (16, 3, 32, 32)),
}


def generator(shape: tuple[int, int, int, int], latent: int = 64, width: int = 64) -> nn.Module:
    """A small generator of images of this shape, so that a step has all of its parts."""
    _, channels, height, _ = shape
    if height == 28:
        hidden = [nn.Linear(latent, 512), nn.ReLU(inplace=True), nn.Linear(512, channels * height**2)]
        return nn.Sequential(*hidden, nn.Tanh(), nn.Unflatten(1, (channels, height, height)))
    layers: list[nn.Module] = [nn.Linear(latent, width * 16), nn.Unflatten(1, (width, 4, 4))]
    size = 4
    while size < height:
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.ConvTranspose2d(width, width // 2, 4, 2, 1)]
        width, size = width // 2, size * 2
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh())
