"""Time and memory of a run's stages on this machine: steps that are quick are measured, slow ones are estimated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgan.config import Config, active_ranks, batch_at, replace
from fastgan.config.auto import StageCost
from fastgan.config.growth import Stage
from fastgan.data import Source
from fastgan.planning.memory import HEADROOM, Footprint
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.footprint import footprint
from fastgan.training.step_measurement import Bench, free_bytes

SECONDS = 0.2
"""Of the measurement of a step, approximately."""
_SLOWEST = 1.0  # seconds of a step that is still measured; at least three run


def stage_costs(
    config: Config, source: Source, world: ProcessGroup, resolutions: Sequence[int]
) -> dict[int, StageCost]:
    """Cost of a step at each resolution, ascending, for each image that the discriminator is shown.

    A step that would take more than a second, or does not fit into memory, is estimated from the one before it, by
    their operations. Communication between ranks is not counted.

    Args:
        config: of the run, with its precision resolved; its own resolution does not matter.
        source: for channels and classes.
        world: the ranks; this one measures, alone.
        resolutions: ascending.
    """
    bench = Bench(config, world.device, source.channels, SECONDS)
    n_critic, costs = config.optimizer.n_critic, dict[int, StageCost]()
    before: tuple[float, float] | None = None  # operations of the last step and its seconds
    for resolution in resolutions:
        batch = batch_at(config.schedule, resolution)
        ranks = active_ranks(batch, world.size, config.schedule.accumulation) or world.size
        micro = max(batch // (ranks * config.schedule.accumulation), 1)
        at = replace(config, schedule={"resolution": resolution, "batch_at": {}, "first_resolution": None})
        needs = footprint(at, source, Stage(resolution, 0, 0, 1), micro, world.size, fading=False)
        operations = float(_operations(needs, n_critic))
        seconds = None if before is None else before[1] * operations / before[0]
        measured = (seconds is None or seconds < _SLOWEST) and needs.bytes * HEADROOM < free_bytes(world.device)
        if measured:
            try:
                timing = bench.time(resolution, micro, False)
                seconds = n_critic * timing.d.seconds + timing.g.seconds
            except MemoryError:
                measured = False
        if seconds is None:
            raise MemoryError(f"{micro} images of {resolution} px need {needs.bytes / 2**30:.1f} GiB")
        before = (operations, seconds)
        shown = n_critic * micro * ranks
        costs[resolution] = StageCost(seconds / shown, needs.bytes * HEADROOM / micro, measured)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return costs


def _operations(needs: Footprint, n_critic: int) -> int:
    return n_critic * needs.flops_d + needs.flops_g
