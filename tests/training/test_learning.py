"""Every variant learns: a few seconds bring its images nearer to the data, by at least half the distance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgan import data
from fastgan.cli.train import parse
from fastgan.config.variants import VARIANTS
from fastgan.evaluation.sliced_wasserstein import sliced_wasserstein
from fastgan.generator import sample_images
from fastgan.training.distributed import process_group as processes
from fastgan.training.trainer import Trainer

FLAGS = {
    "gan": "--width 64 --kimg 12 --lr-g 1e-3 --lr-d 1e-3",
    "dcgan": "--width 16 --max-width 16 --kimg 8 --lr-g 1e-3 --lr-d 1e-3",
    "lsgan": "--width 16 --max-width 16 --kimg 8 --lr-g 1e-3 --lr-d 1e-3",
    "wgan": "--width 16 --max-width 16 --kimg 16",
    "wgan-gp": "--width 16 --max-width 16 --kimg 12 --lr-g 2e-3 --lr-d 2e-3 --n-critic 2",
    "wgan-div": "--width 16 --max-width 16 --kimg 12 --lr-g 2e-3 --lr-d 2e-3 --n-critic 2",
    "sagan": "--width 8 --max-width 16 --kimg 5 --lr-g 1e-3 --lr-d 1e-3",
    "pggan": "--fmap-base 64 --fmap-max 16 --kimg 6",
    "r3gan": "--width 8 --max-width 16 --kimg 8 --lr-g 2e-3 --lr-d 2e-3",
}


SLOW = ("r3gan", "sagan", "gan", "lsgan", "wgan-div")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
)
def test_distance_to_the_data_halves(variant: str, tmp_path: Path) -> None:
    request = parse(
        ["--variant", variant, "--resolution", "8", "--latent", "16", "--batch", "32", *FLAGS[variant].split()]
    )
    source = data.open_source("digits", 8)
    world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
    trainer = Trainer(request.config, variant, world, source, tmp_path)
    real = data.open(source, resolution=8, seed=1).batch(0, 512).images

    def distance() -> float:
        images = sample_images(trainer.stage.ema.module, 512, 0, trainer.stage.networks)
        if images.shape[-1] < 8:
            images = torch.nn.functional.interpolate(images, size=8)
        return sliced_wasserstein(images, real)

    before = distance()
    while trainer.images < trainer.total:
        trainer.train_step()
    assert distance() < before / 2
