"""Train a GAN on handwritten digits from Python, and draw from what it learned.

python examples/train_from_python.py [KIMG] [FOLDER]
"""

from __future__ import annotations

import sys

import fastgan
from fastgan.training import train


def main(kimg: float = 100.0, out: str = "runs/from-python") -> None:
    # The sections and fields of fastgan.config.Config: what flags set too. A run started here is like any other:
    # `fastgan train --resume runs/from-python` continues it, `fastgan evaluate runs/from-python` measures it.
    run = train(
        "wgan-gp",
        "digits",
        schedule={"kimg": kimg, "batch": 64},
        optimizer={"lr_g": 2e-4, "lr_d": 2e-4},
        data={"data": "digits"},
        run={"out": out, "seed": 1},
    )
    generator = fastgan.load(run)
    images = generator.sample(16, seed=0)  # float32 [16, 1, 16, 16] in [-1, 1]
    print(f"{generator} in {run}: {list(images.shape)}, mean {images.mean():.3f}")


if __name__ == "__main__":
    main(*[float(word) for word in sys.argv[1:2]], *sys.argv[2:3])
