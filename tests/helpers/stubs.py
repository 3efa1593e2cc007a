"""A fast extractor, fast images, and one rank of an evaluation.

    python stubs.py OUT

runs one rank of an evaluation, whose result is written to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.data import open_source
from fastgan.evaluation.features import Extracted, Extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.training.distributed import rendezvous
from fastgan.utils import counter_rng

ALL = ["fid", "kid", "is", "prdc", "swd", "msssim"]


class Stub(Extractor):
    """Means of 4 x 4 blocks and their products with fixed numbers, as 12 features and 3 logits."""

    name = "stub"
    dimension = 12
    resize = "means of blocks, to 4 px"
    fingerprint = "0123456789abcdef"
    has_class_score = True

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = 0
        self._mixing = torch.randn(16, 15, generator=generator)

    def __call__(self, images: Tensor) -> Extracted:
        self.images += len(images)
        blocks = F.adaptive_avg_pool2d(images.float() / 255, 4).mean(dim=1).flatten(1)
        mixed = blocks @ self._mixing
        return Extracted(mixed[:, :12], mixed[:, None, 12:])


def draw(indices: Tensor) -> Tensor:
    """Blurred noise that depends only on the index: uint8 [n, 1, 16, 16]."""
    small = counter_rng.uniform(0, "test", indices, 64).view(-1, 1, 8, 8)
    return (F.interpolate(small, scale_factor=2.0, mode="bilinear") * 255).round().to(torch.uint8)


def main() -> None:
    torch.set_num_threads(1)
    group = rendezvous.join("cpu")
    result = Evaluation(ALL, Stub(), 600)(draw, open_source("digits", 16), 16, lambda text: None)
    if group.main:
        Path(sys.argv[1]).write_text(json.dumps(result))
    assert (result is None) == (group.rank > 0)
    rendezvous.stop()


if __name__ == "__main__":
    main()
