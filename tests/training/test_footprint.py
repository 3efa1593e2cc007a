"""Memory and operations of a step, counted on the meta device."""

from __future__ import annotations

from fastgan.cli.train import parse
from fastgan.config.growth import stages_of
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
    # Parameters, gradients and two optimizer states of both networks, and the moving average of G, in float32.
    assert four.bytes > 4 * (4 * (four.g + four.d) + four.g)
