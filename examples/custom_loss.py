"""A loss of your own in the trainer: a squared hinge, with a gradient penalty of ours.

python examples/custom_loss.py [KIMG] [FOLDER]
"""

from __future__ import annotations

import sys

from torch import Tensor

import fastgan
from fastgan import objectives
from fastgan.training import train


def discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Scores [N] of real and of generated images -> a scalar: squared hinges, which give far outliers more weight."""
    return (1 - real).clamp(min=0).square().mean() + (1 + fake).clamp(min=0).square().mean()


def generator(fake: Tensor) -> Tensor:
    return -fake.mean()


def main(kimg: float = 50.0, out: str = "runs/custom-loss") -> None:
    objectives.register("squared-hinge", objectives.Loss(discriminator, generator))
    objective = {"loss": "squared-hinge", "regularizer": "zero-centered", "penalty_weight": 1.0}
    run = train("dcgan", "digits", objective=objective, networks={"norm_d": "none"},
                schedule={"kimg": kimg}, run={"out": out})  # fmt: skip
    print(f"{fastgan.load(run)} with a loss of our own in {run}")  # to sample a run, its loss is not needed


if __name__ == "__main__":
    main(*[float(word) for word in sys.argv[1:2]], *sys.argv[2:3])
