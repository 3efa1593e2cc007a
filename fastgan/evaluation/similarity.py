"""Multi-scale structural similarity (MS-SSIM) between images of one set: a measure of its diversity."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastgan.evaluation.statistic import Sums

# Exponents of the scales, finest first (Wang, Simoncelli and Bovik 2003).
_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_KERNEL = 11


def scales(resolution: int) -> int:
    """Number of scales for images of `resolution` px: at most 5, the coarsest at least as large as the 11 px window."""
    return sum(resolution // 2**i >= _KERNEL for i in range(len(_BETAS)))


class PairSimilarity(Sums):
    """Mean MS-SSIM over the pairs of images 2i and 2i + 1, by torchmetrics.

    It is high if a generator repeats itself (Odena et al. 2017, section 4.2). With fewer than 5 scales, the exponents
    are scaled to the sum of all five.
    """

    FIELDS: ClassVar = {"total": "total", "count": "count"}

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def update(self, images: Tensor) -> None:
        """Add an even number of consecutive images, uint8 [2 N, C, R, R].

        Raises:
            ValueError: R is below 11.
        """
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        levels = scales(images.shape[-1])
        if not levels:
            raise ValueError(f"images must have at least {_KERNEL} px, got {images.shape[-1]}")
        betas = tuple(beta * sum(_BETAS) / sum(_BETAS[:levels]) for beta in _BETAS[:levels])
        images = images.float()
        similarities = multiscale_structural_similarity_index_measure(
            images[0::2], images[1::2], reduction="none", data_range=255.0, betas=betas, kernel_size=_KERNEL
        )
        self.total += similarities.double().sum().cpu()
        self.count += len(similarities)

    def result(self) -> float:
        return (self.total / self.count).item()
