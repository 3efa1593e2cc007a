"""Draw what a discriminator sees of a data set under augmentation.

    python -m benchmarks.studies.augmentation_sheet [--data stacked-digits] [--resolution 32] [--out docs/augmentation]

Writes ada-0.png, ada-0.5.png, ada-1.png (by strength) and diffaugment.png: the same 64 images in each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastgan import data
from fastgan.training.augmentation import Adaptive, Augmentation, Differentiable
from fastgan.training.observability.metrics_log import save_grid

ROOT = Path(__file__).resolve().parents[2]
STRENGTHS = (0.0, 0.5, 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stacked-digits")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "augmentation")
    given = parser.parse_args()
    source = data.open_source(given.data, given.resolution)
    with data.open(source, resolution=given.resolution, seed=0) as pipeline:
        images = pipeline.batch(0, 64).images
    sheets: dict[str, Augmentation] = {
        f"ada-{strength:g}": Adaptive(source.channels, 0, strength=strength) for strength in STRENGTHS
    }
    sheets["diffaugment"] = Differentiable(source.channels, 0)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, augment in sheets.items():
        save_grid(augment(images, torch.arange(64), "real"), given.out / f"{name}.png", size=given.resolution)
    print(f"4 sheets in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
