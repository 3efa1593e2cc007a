"""A small classifier of scikit-learn's digits: features and classes of generated digits without a download."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.data import open_source

_SIZE = 16


@dataclass(frozen=True)
class DigitReport:
    """Classes of a set of images.

    Attributes:
        counts: number of images of each class, [10].
        confident: share of images whose class has a probability above 0.9.
    """

    counts: list[int]
    confident: float

    def __str__(self) -> str:
        classes = sum(count > 0 for count in self.counts)
        return f"{classes} of 10 digits, {100 * self.confident:.1f}% confident, counts {self.counts}"


def _resize(images: Tensor) -> Tensor:
    """[N, C, R, R] to [N, 1, 16, 16], averaging channels."""
    images = images.mean(dim=1, keepdim=True)
    return F.interpolate(images, size=(_SIZE, _SIZE), mode="bilinear", antialias=True, align_corners=False)


def _training_images() -> tuple[Tensor, Tensor]:
    source = open_source("digits", _SIZE)
    pixels = np.stack([source.read(i, _SIZE) for i in range(len(source))])
    return torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(np.asarray(source.labels))


@functools.cache
def classifier() -> tuple[nn.Module, float]:
    """The classifier and its accuracy on a held-out fifth of the digits.

    Training takes a few seconds, is seeded, and does not change the caller's random state.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10),
        )  # fmt: skip
        images, labels = _training_images()
        order = torch.randperm(len(images))
        held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(15):
            for batch in train[torch.randperm(len(train))].split(64):
                loss = F.cross_entropy(network(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        network.eval()
        with torch.no_grad():
            accuracy = (network(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return network, accuracy


@torch.no_grad()
def features_and_logits(images: Tensor) -> tuple[Tensor, Tensor]:
    """The classifier applied to each channel of images [N, C, R, R] in [-1, 1].

    Returns:
        The input of its last layer, float32 [N, C, 1024], and its logits, float32 [N, C, 10].
    """
    network = classifier()[0].to(images.device)
    assert isinstance(network, nn.Sequential)
    n, c = images.shape[:2]
    features = network[:-1](_resize(images.flatten(0, 1)[:, None]))
    return features.unflatten(0, (n, c)), network[-1](features).unflatten(0, (n, c))


@torch.no_grad()
def report(images: Tensor) -> DigitReport:
    """Classify images [N, C, R, R] in [-1, 1], averaged over channels."""
    probability = torch.cat([F.softmax(classifier()[0](_resize(part)), dim=1) for part in images.split(256)])
    top = probability.max(dim=1)
    counts = torch.bincount(top.indices, minlength=10).tolist()
    return DigitReport(counts, (top.values > 0.9).float().mean().item())
