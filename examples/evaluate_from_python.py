"""Measure a run from Python: distances to the real images, precision and recall, what was memorized.

python examples/evaluate_from_python.py [RUN] [DATA] [IMAGES]
"""

from __future__ import annotations

import sys

import fastgan
from fastgan.evaluation import evaluate


def main(run: str = "runs/from-python", data: str = "digits", n: int = 2000) -> None:
    generator = fastgan.load(run)
    values = evaluate(generator, data, n=n, metrics=["fid", "prdc", "msssim"])
    print(f"{generator}, {n} images against {data}")
    for name in ("frechet_distance", "precision", "recall", "memorized", "ms_ssim"):
        print(f"  {name:18} {values[name]:.4g}")
    if values["memorized"] > 0.2:
        print("many images are nearer to a training image than that is to any other: use more data, or augment")


if __name__ == "__main__":
    main(*sys.argv[1:3], *[int(word) for word in sys.argv[3:4]])
