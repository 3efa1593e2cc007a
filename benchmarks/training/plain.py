"""Plain PyTorch: the networks and the training step as one writes them from the papers, with torch's defaults.

The other side of `benchmarks.training.whole_steps`. Parameters have the names of fastgan's networks, whose weights they
load, so that both sides can be shown to compute the same losses before they are timed.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

# --- progressive GAN (Karras et al. 2018) at the end of a stage, the same width at every resolution ------------------


class Equalized(nn.Module):
    """A convolution or linear layer whose weights are scaled by He's constant in every forward pass."""

    def __init__(self, inputs: int, outputs: int, kernel: int | None, gain: float = math.sqrt(2.0)) -> None:
        super().__init__()
        shape = (outputs, inputs) if kernel is None else (outputs, inputs, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / math.sqrt(inputs * (kernel or 1) ** 2)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return F.linear(x, self.weight * self.scale, self.bias)
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.kernel // 2)


def lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def pixel_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def minibatch_stddev(x: Tensor, group: int = 4) -> Tensor:
    n, _, h, w = x.shape
    y = x.view(group, n // group, *x.shape[1:])
    deviation = (y - y.mean(dim=0)).square().mean(dim=0).add(1e-8).sqrt().mean(dim=(1, 2, 3))
    return torch.cat([x, deviation.repeat(group)[:, None, None, None].expand(n, 1, h, w)], dim=1)


def _sizes(resolution: int) -> list[int]:
    return [2**i for i in range(3, int(math.log2(resolution)) + 1)]


class ProgressiveGenerator(nn.Module):
    def __init__(self, resolution: int, channels: int, latent: int, width: int) -> None:
        super().__init__()
        self.latent = latent
        self.input = Equalized(latent, width * 16, None, math.sqrt(2.0) / 4)
        self.conv = Equalized(width, width, 3)
        pairs = {
            str(s): {"conv1": Equalized(width, width, 3), "conv2": Equalized(width, width, 3)}
            for s in _sizes(resolution)
        }
        self.blocks = nn.ModuleDict({size: nn.ModuleDict(pair) for size, pair in pairs.items()})
        self.to_rgb = nn.ModuleDict({str(resolution): Equalized(width, channels, 1, 1.0)})

    def forward(self, z: Tensor) -> Tensor:
        x = pixel_norm(lrelu(self.input(pixel_norm(z)).view(len(z), -1, 4, 4)))
        x = pixel_norm(lrelu(self.conv(x)))
        for block in self.blocks.values():
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = pixel_norm(lrelu(block["conv1"](x)))  # type: ignore[index]
            x = pixel_norm(lrelu(block["conv2"](x)))  # type: ignore[index]
        (to_rgb,) = self.to_rgb.values()
        return to_rgb(x)


class ProgressiveDiscriminator(nn.Module):
    def __init__(self, resolution: int, channels: int, width: int) -> None:
        super().__init__()
        self.from_rgb = nn.ModuleDict({str(resolution): Equalized(channels, width, 1)})
        sizes = _sizes(resolution)[::-1]
        pairs = {str(s): {"conv1": Equalized(width, width, 3), "conv2": Equalized(width, width, 3)} for s in sizes}
        self.blocks = nn.ModuleDict({size: nn.ModuleDict(pair) for size, pair in pairs.items()})
        self.conv = Equalized(width + 1, width, 3)
        self.dense = Equalized(width * 16, width, None)
        self.output = Equalized(width, 1, None, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        (from_rgb,) = self.from_rgb.values()
        x = lrelu(from_rgb(images))
        for block in self.blocks.values():
            # As in the authors' code, the scale changes before the activation.
            x = lrelu(F.avg_pool2d(block["conv2"](lrelu(block["conv1"](x))), 2))  # type: ignore[index]
        x = lrelu(self.conv(minibatch_stddev(x)))
        return self.output(lrelu(self.dense(x.flatten(1)))).squeeze(1)


# --- DCGAN (Radford et al. 2015) -------------------------------------------------------------------------------------


def _norm(channels: int, batch_norm: bool) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels)] if batch_norm else []


class DcganGenerator(nn.Module):
    def __init__(self, widths: list[int], channels: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], 4, bias=False), *_norm(widths[0], True)]
        for before, after in itertools.pairwise(widths):
            layers += [nn.ReLU(True), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), *_norm(after, True)]
        layers += [nn.ReLU(True), nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.layers(z[:, :, None, None]))


class DcganDiscriminator(nn.Module):
    def __init__(self, widths: list[int], channels: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(widths):
            conv = nn.Conv2d(before, after, 4, 2, 1, bias=not batch_norm)
            layers += [conv, *_norm(after, batch_norm), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten()


# --- SAGAN (Zhang et al. 2018) ---------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> nn.Module:
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (_conv(channels, channels // 8, 1, False) for _ in range(2))
        self.value, self.output = _conv(channels, channels // 2, 1, False), _conv(channels // 2, channels, 1, False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        query = self.query(x).view(n, -1, h * w)
        key = F.max_pool2d(self.key(x), 2).view(n, -1, h * w // 4)
        value = F.max_pool2d(self.value(x), 2).view(n, -1, h * w // 4)
        share = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)
        return x + self.gamma * self.output(torch.bmm(value, share.transpose(1, 2)).view(n, -1, h, w))


class SaganGeneratorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.ModuleDict({"norm": nn.BatchNorm2d(size)}) for size in (inputs, outputs))
        self.conv1, self.conv2 = _conv(inputs, outputs, bias=False), _conv(outputs, outputs)
        self.shortcut = _conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.norm1["norm"](x)), scale_factor=2, mode="nearest")
        y = self.conv2(F.relu(self.norm2["norm"](self.conv1(y))))
        return y + self.shortcut(F.interpolate(x, scale_factor=2, mode="nearest"))


class SaganGenerator(nn.Module):
    def __init__(self, widths: dict[int, int], channels: int, latent: int, attention_at: int) -> None:
        super().__init__()
        self.latent = latent
        self.input = spectral_norm(nn.Linear(latent, widths[4] * 16))
        sizes = list(widths)[1:]
        self.blocks = nn.ModuleDict({str(s): SaganGeneratorBlock(widths[s // 2], widths[s]) for s in sizes})
        self.attention = nn.ModuleDict({str(attention_at): Attention(widths[attention_at])})
        self.norm = nn.BatchNorm2d(widths[sizes[-1]])
        self.output = _conv(widths[sizes[-1]], channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.input(z).view(len(z), -1, 4, 4)
        for size, block in self.blocks.items():
            x = block(x)
            x = self.attention[size](x) if size in self.attention else x
        return torch.tanh(self.output(F.relu(self.norm(x))))


class SaganDiscriminatorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, down: bool = True, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1, self.conv2 = _conv(inputs, outputs), _conv(outputs, outputs)
        self.shortcut = _conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x)))) + self.shortcut(x)
        return F.avg_pool2d(y, 2) if self.down else y


class SaganDiscriminator(nn.Module):
    def __init__(self, widths: dict[int, int], channels: int, attention_at: int) -> None:
        super().__init__()
        self.blocks, before = nn.ModuleDict(), channels
        for size in list(widths)[:0:-1]:
            self.blocks[str(size // 2)] = SaganDiscriminatorBlock(before, widths[size], first=before == channels)
            before = widths[size]
        self.attention = nn.ModuleDict({str(attention_at): Attention(widths[2 * attention_at])})
        self.last = SaganDiscriminatorBlock(before, widths[4], down=False)
        self.output = spectral_norm(nn.Linear(widths[4], 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for size, block in self.blocks.items():
            x = block(x)
            x = self.attention[size](x) if size in self.attention else x
        return self.output(F.relu(self.last(x)).sum(dim=(2, 3))).squeeze(1)


# --- the step --------------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "minimax": (lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(), lambda f: F.softplus(-f).mean()),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
    "hinge": (lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda f: -f.mean()),
}


class PlainTrainer:
    """Both networks, Adam, a moving average, and a finite check: what such a script has around its losses.

    Args:
        generator, discriminator: the networks.
        loss: name in `LOSSES`.
        penalty, drift: coefficients of the gradient penalty and of the mean squared score of real images; 0: without.
        betas: of Adam.
        autocast: precision of the networks; None: float32.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: str,
        penalty: float,
        drift: float,
        betas: tuple[float, float],
        autocast: torch.dtype | None,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator).eval().requires_grad_(False)
        self.loss_d, self.loss_g = LOSSES[loss]
        self.latent: int = generator.latent  # type: ignore[assignment]
        self.penalty, self.drift, self.autocast = penalty, drift, autocast
        self.adam_g = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=betas)
        self.adam_d = torch.optim.Adam(discriminator.parameters(), lr=1e-4, betas=betas)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def discriminator_loss(self, real: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        """Loss for images `real`, latents `z` and interpolation weights `weight` [N]."""
        with self._autocast():
            with torch.no_grad():
                fake = self.generator(z)
            fake = fake.to(real.dtype)
            score_real, score_fake = self.discriminator(real).float(), self.discriminator(fake).float()
            loss = self.loss_d(score_real, score_fake) + self.drift * score_real.square().mean()
            if self.penalty:
                x = torch.lerp(real, fake, weight[:, None, None, None]).requires_grad_(True)
                scores = self.discriminator(x).float().sum()
                (gradient,) = torch.autograd.grad(scores, x, create_graph=True)
                loss = loss + self.penalty * (gradient.flatten(1).float().norm(dim=1) - 1).square().mean()
        return loss

    def step(self, real: Tensor) -> None:
        n, latent = len(real), self.latent
        self.adam_d.zero_grad()
        self.discriminator_loss(real, torch.randn(n, latent), torch.rand(n)).backward()
        self._finite(self.discriminator)
        self.adam_d.step()
        self.discriminator.requires_grad_(False)
        self.adam_g.zero_grad()
        with self._autocast():
            scores = self.discriminator(self.generator(torch.randn(n, latent)))
        self.loss_g(scores.float()).backward()
        self._finite(self.generator)
        self.adam_g.step()
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                mine.lerp_(theirs, 0.001)

    @staticmethod
    def _finite(module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise RuntimeError("a gradient is not finite")
