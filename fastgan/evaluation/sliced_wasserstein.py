"""Sliced Wasserstein distance between two sets of vectors, and between patches of two sets of images at each scale.

Rabin et al. 2011; Karras et al. 2018, section 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.evaluation.statistic import IndexedRows
from fastgan.utils import counter_rng

PATCH = 7
PATCHES = 128
PROJECTIONS = 128
REPEATS = 4
COARSEST = 16
_CHUNK = 16
_BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


def _sorted_projections(vectors: Tensor, directions: Tensor) -> Tensor:
    """[N, D], [D, P] -> [P, N], each row ascending."""
    rows = (directions.T @ vectors.T).contiguous()
    if rows.device.type == "cpu":
        rows.numpy().sort(axis=1)  # vectorized, 2.6 times as fast as torch's sort here
        return rows
    return rows.sort(dim=1).values


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = PROJECTIONS, seed: int = 0) -> float:
    """Mean over random unit directions of the 1-Wasserstein distance between the projected sets.

    Args:
        a: samples [N, ...], flattened to vectors.
        b: as many samples of the same shape.
        projections: number of directions, drawn from `seed`.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"b must have shape {tuple(a.shape)}, as a has, got {tuple(b.shape)}")
    a, b = a.detach().flatten(1).float(), b.detach().flatten(1).float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator).to(a.device)
    directions = directions / directions.norm(dim=0)
    total = 0.0
    for chunk in directions.split(_CHUNK, dim=1):
        difference = _sorted_projections(a, chunk) - _sorted_projections(b, chunk)
        total += difference.abs_().mean(dim=1, dtype=torch.float64).sum().item()
    return total / projections


def _blur(images: Tensor, gain: float = 1.0) -> Tensor:
    """5 x 5 binomial filter with reflection padding."""
    kernel = _BINOMIAL.to(images) * gain
    channels = images.shape[1]
    images = F.pad(images, (2, 2, 2, 2), mode="reflect")
    images = F.conv2d(images, kernel.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(images, kernel.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Levels of images [N, C, R, R], finest first: R, R/2, ... down to 16 px, each float32 [N, C, r, r].

    A level is the image minus its half-size version enlarged again; the last level is the smallest version (Burt and
    Adelson 1983). Images of less than 32 px have one level.
    """
    levels = []
    image = images.float()
    while image.shape[-1] >= 2 * COARSEST:
        half = _blur(image)[:, :, ::2, ::2]
        spread = torch.zeros_like(image)
        spread[:, :, ::2, ::2] = half
        levels.append(image - _blur(spread, gain=2.0))  # three of four pixels are zero: a gain of 2 in each direction
        image = half
    return [*levels, image]


class Patches(IndexedRows):
    """Random 7 x 7 patches of images: 128 at each level of the Laplacian pyramid of each image.

    Their positions depend only on (seed, stream, image index), and so not on the number of ranks.

    Args:
        seed: seed of the positions.
        stream: random stream of the positions; two sets that are compared need different ones.
        limit: images with a larger or equal index are ignored.
    """

    KEY = "level{}"

    def __init__(self, seed: int, stream: str, limit: int) -> None:
        super().__init__(limit)
        self.seed, self.stream = seed, stream

    def update(self, indices: Tensor, images: Tensor) -> None:
        """Add images `indices` (int64 [N]), uint8 [N, C, R, R], R at least 7."""
        use = indices < self.limit
        if not use.any():
            return
        indices, images = indices[use], images[use.to(images.device)]
        self._indices.append(indices)
        self._tensors.append([self._cut(level, indices) for level in laplacian_pyramid(images)])

    def _cut(self, level: Tensor, indices: Tensor) -> Tensor:
        """Patches [N, 128, C, 7, 7] of one level, on the CPU."""
        n, c, r, _ = level.shape
        positions = r - PATCH + 1
        unit = counter_rng.uniform(self.seed, f"{self.stream} patches at {r} px", indices, 2 * PATCHES)
        corner = (unit * positions).long().clamp(max=positions - 1).to(level.device)
        offset = torch.arange(PATCH, device=level.device)
        y = corner[:, :PATCHES, None] + offset
        x = corner[:, PATCHES:, None] + offset
        pixel = (y[:, :, :, None] * r + x[:, :, None, :]).reshape(n, 1, -1).expand(n, c, -1)
        patches = level.flatten(2).gather(2, pixel).view(n, c, PATCHES, PATCH, PATCH)
        return patches.transpose(1, 2).contiguous().cpu()

    def levels(self) -> list[Tensor]:
        """Patches [images, 128, C, 7, 7] of each level, finest first, in the order of the images."""
        return self.tensors()


def bytes_of_patches(resolution: int, channels: int) -> int:
    """Bytes of memory that the patches of one image need."""
    levels = 1
    while resolution >> levels >= COARSEST:
        levels += 1
    return levels * PATCHES * channels * PATCH**2 * 4


def _normalized(patches: Tensor) -> Tensor:
    """Patches [N, 128, C, 7, 7] as vectors; each channel has mean 0 and deviation 1 over the set."""
    patches = patches.flatten(0, 1)
    deviation, mean = torch.std_mean(patches, dim=(0, 2, 3), keepdim=True, correction=0)
    return ((patches - mean) / deviation.clamp(min=1e-12)).flatten(1)


def patch_distances(a: list[Tensor], b: list[Tensor], seed: int = 0) -> dict[int, float]:
    """Sliced Wasserstein distance at each level, {level: distance}; level 0 is the finest.

    The mean over 4 sets of 128 directions. The patches of each set are normalized by the mean and deviation of each
    channel.

    Args:
        a: patches as `Patches.levels` returns them.
        b: patches of as many images.
    """
    distances = {}
    for i, (patches_a, patches_b) in enumerate(zip(a, b, strict=True)):
        x, y = _normalized(patches_a), _normalized(patches_b)
        repeats = [sliced_wasserstein(x, y, PROJECTIONS, seed * REPEATS + r) for r in range(REPEATS)]
        distances[i] = sum(repeats) / REPEATS
    return distances
