"""Draw from a generator that comes with fastgan, and walk between its images.

python examples/sample_and_interpolate.py [NAME or RUN] [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

import fastgan
from fastgan.generator import generate, great_circle


def grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Images [N, C, R, R] in [-1, 1] side by side, C 1 or 3."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).unflatten(0, (-1, columns))
    rows = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows * R, columns * R, C]
    return Image.fromarray(rows.squeeze(-1).numpy())


def main(source: str = "avatars", folder: str = ".") -> None:
    generator = fastgan.load(source)
    # Image i depends on the seed and on i alone: the first 16 of 64 are the same 16.
    grid(generator.sample(32, seed=0), columns=8).save(Path(folder) / "samples.png")
    grid(generator.interpolate(rows=4, columns=8, seed=1), columns=8).save(Path(folder) / "walks.png")

    # Latents of your own: float32 [N, latent], standard normal. Here, the great circle from one image to another.
    start, end = torch.randn(2, generator.latent, generator=torch.Generator().manual_seed(2))
    path = torch.stack([great_circle(start, end, t) for t in torch.linspace(0, 1, 8)])
    labels = torch.zeros(8, dtype=torch.int64) if generator.num_classes else None
    images = generate(generator.module, path, labels, generator.meta["networks"]["resolution"])
    grid(images, columns=8).save(Path(folder) / "path.png")
    print(f"{generator}, {images.shape[-1]} px: samples.png, walks.png and path.png in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
