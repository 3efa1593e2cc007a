"""Sliced Wasserstein distance between two sets of images (Rabin et al. 2011)."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Mean over random unit directions of the 1-Wasserstein distance between the projected sets.

    Args:
        a, b: the same number of samples, [N, ...]; flattened to vectors.
        projections: number of directions, drawn from `seed`.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"b: had shape {tuple(b.shape)}; it may be {tuple(a.shape)}, as a")
    a, b = a.flatten(1).float(), b.flatten(1).float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator).to(a.device)
    directions = directions / directions.norm(dim=0)
    return ((a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values).abs().mean().item()
