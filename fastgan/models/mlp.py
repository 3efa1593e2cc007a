"""Multilayer perceptrons, the networks of the first GAN (Goodfellow et al. 2014, section 5).

The generator has two hidden layers of rectifiers, the discriminator two of as many maxout units (the authors' have 1200
and 240). There is no dropout in the discriminator, unlike in the paper: its random numbers would not belong to a sample
(see `fastgan.utils.counter_rng`). Images are in [-1, 1] from a tanh; the authors' are in [0, 1] from a sigmoid. Weights
have torch's default initialization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.hub import Pretrained
from fastgan.nn import Maxout


class Generator(nn.Module, Pretrained):
    """latent [N, latent] -> images [N, C, R, R] in [-1, 1]."""

    def __init__(self, *, resolution: int, channels: int, latent: int, width: int) -> None:
        super().__init__()
        self.latent = latent
        self.shape = (channels, resolution, resolution)
        self.hidden1 = nn.Linear(latent, width)
        self.hidden2 = nn.Linear(width, width)
        self.output = nn.Linear(width, channels * resolution**2)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        x = F.relu(self.hidden1(latent))
        x = F.relu(self.hidden2(x))
        return torch.tanh(self.output(x)).unflatten(1, self.shape)


class Discriminator(nn.Module):
    """images [N, C, R, R] -> scores [N]."""

    def __init__(self, *, resolution: int, channels: int, width: int) -> None:
        super().__init__()
        self.hidden1 = Maxout(channels * resolution**2, width)
        self.hidden2 = Maxout(width, width)
        self.output = nn.Linear(width, 1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.output(self.hidden2(self.hidden1(images.flatten(1)))).squeeze(1)
