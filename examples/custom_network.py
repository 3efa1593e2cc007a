"""Networks of your own in the trainer: checkpoints, resume, samples, evaluation and export work as with ours.

python examples/custom_network.py [KIMG] [FOLDER]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import fastgan
from fastgan import models
from fastgan.training import train


class Generator(nn.Module):
    """latent [N, latent] -> images [N, C, R, R]: a sum of `width` learned patterns, one image each."""

    def __init__(self, *, resolution: int, channels: int, latent: int, width: int) -> None:
        super().__init__()
        self.latent = latent  # every generator says how long its latents are
        self.shape = channels, resolution, resolution
        self.mix = nn.Sequential(nn.Linear(latent, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.patterns = nn.Parameter(0.1 * torch.randn(width, channels * resolution**2))

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.tanh(self.mix(latent) @ self.patterns).unflatten(1, self.shape)


class Discriminator(nn.Module):
    """images [N, C, R, R] -> scores [N]."""

    def __init__(self, *, resolution: int, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(channels * resolution**2, width), nn.LeakyReLU(0.2),
                                    nn.Linear(width, 1))  # fmt: skip

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(images).flatten()


def main(kimg: float = 50.0, out: str = "runs/custom-network") -> None:
    # A class takes the values of fastgan.config.Networks that it names, and resolution, channels and num_classes.
    models.register("patterns", Generator, Discriminator)
    networks = {"model": "patterns", "latent": 16, "width": 128}
    run = train("gan", "digits", networks=networks, schedule={"kimg": kimg}, run={"out": out})
    generator = fastgan.load(run)  # a program that loads the run registers the model first, as this one has
    print(f"{generator}: {type(generator.module).__name__}, {list(generator.sample(16).shape)}")


if __name__ == "__main__":
    main(*[float(word) for word in sys.argv[1:2]], *sys.argv[2:3])
