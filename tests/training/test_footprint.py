"""Memory and operations of a step, counted on the meta device."""

from __future__ import annotations

import pytest

from fastgan.cli.train import parse
from fastgan.config import replace
from fastgan.config.growth import stages_of
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.training.footprint import footprint


def test_footprint_against_hand_computation() -> None:
    flags = "--variant gan --width 16 --latent 8 --resolution 8 --batch 4 --optimizer adam".split()
    config = parse(flags).config
    source, (stage,) = open_source("digits", 8), stages_of(config)
    four = footprint(config, source, stage, 4, 1, fading=False)
    eight = footprint(config, source, stage, 8, 1, fading=False)
    assert (four.g, four.d) == (8 * 16 + 16 + 16 * 16 + 16 + 16 * 64 + 64, eight.d)
    # All products are proportional to the batch: G's forward, and D's forward and backward to weights and to inputs.
    assert eight.flops_g == 2 * four.flops_g > 0 and eight.flops_d == 2 * four.flops_d > 0
    products_g = 8 * 16 + 16 * 16 + 16 * 64
    assert four.flops_g > 3 * 2 * 4 * products_g - 2 * 4 * 8 * 16
    captured = footprint(replace(config, system={"capture": True}), source, stage, 4, 1, fading=False)
    state = 4 * (4 * (four.g + four.d) + four.g)
    assert captured.bytes == 2 * four.bytes + state  # activations twice, and two copies of the state for the check
    # Parameters, gradients and two optimizer states of both networks, and the moving average of G, in float32.
    assert four.bytes > state


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_can_be_counted_with_augmentation(variant: str) -> None:
    counted = {}
    for augment in ("none", "ada", "diffaugment"):
        config = parse(["--variant", variant, "--augment", augment, "--precision", "bf16"]).config
        source, stage = open_source("digits", config.schedule.resolution), stages_of(config)[-1]
        counted[augment] = footprint(config, source, stage, 4, 1, fading=False)
    assert counted["ada"].flops_d > counted["none"].flops_d < counted["diffaugment"].flops_d
    assert counted["ada"].g == counted["none"].g > 0 and counted["none"].flops_g > 0
