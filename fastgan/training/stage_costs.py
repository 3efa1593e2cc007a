"""Time and memory of a run's stages on this machine: steps that are quick are measured, slow ones are estimated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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
_LARGE = 128  # from here on memory is counted first
_SCALE = 4.5  # a step of twice the resolution takes at most about so many times as long


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
    needs = _footprints(config, source, world.size)
    before: tuple[int, int, float] | None = None  # resolution and micro-batch of the last step, its seconds
    for resolution in resolutions:
        batch = batch_at(config.schedule, resolution)
        ranks = active_ranks(batch, world.size, config.schedule.accumulation) or world.size
        micro = max(batch // (ranks * config.schedule.accumulation), 1)
        seconds, nbytes, fits, scatter = None, 0.0, True, 0.0
        if before is not None:
            seconds = _SCALE * before[2] * micro / before[1]
        if resolution >= _LARGE or (seconds is not None and seconds > _SLOWEST):
            nbytes = needs(resolution, micro).bytes * HEADROOM
            fits = nbytes < free_bytes(world.device)
            if before is not None:
                operations = [_operations(needs(r, n), n_critic) for r, n in ((resolution, micro), before[:2])]
                seconds = before[2] * operations[0] / operations[1]
        measured = fits and (seconds is None or seconds < _SLOWEST)
        if measured:
            try:
                timing = bench.time(resolution, micro, False)
                seconds, scatter = n_critic * timing.d.seconds + timing.g.seconds, bench.scatters[-1]
            except MemoryError:
                measured = False
        if seconds is None:
            raise MemoryError(f"{micro} images of {resolution} px need {nbytes / 2**30:.1f} GiB")
        before = (resolution, micro, seconds)
        costs[resolution] = StageCost(seconds / (n_critic * micro * ranks), nbytes / micro, measured, scatter)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return costs


def _footprints(config: Config, source: Source, ranks: int) -> Callable[[int, int], Footprint]:
    """Footprint of a step on a micro-batch at a resolution. Augmentation is left out: it adds little, and is slow to
    count."""
    plain = replace(config, data={"augment": "none"})

    @functools.cache
    def needs(resolution: int, micro: int) -> Footprint:
        at = replace(plain, schedule={"resolution": resolution, "batch_at": {}, "first_resolution": None})
        return footprint(at, source, Stage(resolution, 0, 0, 1), micro, ranks, fading=False)

    return needs


def _operations(needs: Footprint, n_critic: int) -> int:
    return n_critic * needs.flops_d + needs.flops_g
