"""Step times as `fastgan plan` records them, made up."""

from __future__ import annotations

import torch

from fastgan.cli.train import parse
from fastgan.planning.cost_model import UpdateTime
from fastgan.planning.step_times import SCHEMA, StepTimes, Timing, recipe_of

SMALL = "--variant pggan --data digits --batch 32 --fmap-base 32 --fmap-max 8 --latent 8 --resolution 8".split()
SMALL += "--kimg 1 --fade-kimg 0.25 --stable-kimg 0.5".split()


def step_times(flags: list[str], steps: list[tuple[int, int, bool, float]]) -> StepTimes:
    """Of a run with `flags`; each step is (resolution, micro-batch, fading, seconds), three quarters of them D's."""
    timings = [
        Timing(px, micro, fading, UpdateTime(0.75 * s, ((1000, 0.0),)), UpdateTime(0.25 * s, ((1000, 0.0),)))
        for px, micro, fading, s in steps
    ]
    return StepTimes(SCHEMA, "a device", torch.__version__, recipe_of(parse(flags).config, 1), timings)
