"""What augmentation adds to a training step.

    python -m benchmarks.training.bench_augmentation [VARIANT ...] [--rounds 5] [--seconds 2]

Prints for each variant, with its digits preset at two sizes, the time of a step (one update of each network) without
augmentation and the share that ADA, at strength 0.5, and DiffAugment add. Rounds alternate, and the least counts.
"""

from __future__ import annotations

import argparse
import sys

import torch

from fastgan.config import batch_at, replace
from fastgan.config.variants import VARIANTS
from fastgan.training import from_config
from fastgan.training.augmentation import Adaptive
from fastgan.training.step_measurement import Bench

SIZES = ((1, 16), (3, 64))
NAMES = ("none", "ada", "diffaugment")


class _AtHalf(Adaptive):
    """At a strength at which most images are transformed."""

    def __init__(self, channels: int, seed: int, **options: float) -> None:
        super().__init__(channels, seed, **{**options, "strength": 0.5})


def seconds(variant: str, augment: str, channels: int, resolution: int, duration: float) -> float:
    """Of a step; the batch is the preset's, at most 16 at 64 px."""
    config = replace(VARIANTS[variant].config("digits"), data={"augment": augment})
    batch = min(batch_at(config.schedule, resolution), 1024 // resolution)
    timing = Bench(config, torch.device("cpu"), channels, duration).time(resolution, batch, fading=False)
    return timing.d.seconds * config.optimizer.n_critic + timing.g.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    given = parser.parse_args()
    from_config.Adaptive = _AtHalf  # type: ignore[misc]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'variant':9} {'images':>10} {'step, ms':>9} {'ada':>8} {'diffaugment':>12}")
    for variant in given.variants:
        for channels, resolution in SIZES:
            best = dict.fromkeys(NAMES, float("inf"))
            for _ in range(given.rounds):
                for name in NAMES:
                    best[name] = min(best[name], seconds(variant, name, channels, resolution, given.seconds))
            added = [f"{100 * (best[name] / best['none'] - 1):+.1f}%" for name in NAMES[1:]]
            size = f"{channels}x{resolution} px"
            print(f"{variant:9} {size:>10} {1000 * best['none']:9.1f} {added[0]:>8} {added[1]:>12}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
