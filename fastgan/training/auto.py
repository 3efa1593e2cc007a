"""The preset `auto` and `--hours` on a machine: looks at the pictures, measures steps, and decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgan.config import Config, replace, validate
from fastgan.config.auto import (
    NEEDED_KIMG,
    Decision,
    Machine,
    Pictures,
    StageCost,
    Width,
    Wish,
    choose,
    choose_variant,
    kimg_within,
    recipe,
    resolutions,
    run_seconds,
    training_seconds,
)
from fastgan.config.growth import stages_of
from fastgan.config.images import source_arguments
from fastgan.data import Source, open_source
from fastgan.data.survey import survey
from fastgan.errors import ArgumentError
from fastgan.training import precision
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.stage_costs import stage_costs
from fastgan.training.step_measurement import busy, free_bytes
from fastgan.utils.text import readable_duration

_WORTH_MEASURING = 20.0
"""Runs of fewer kimg end before a measurement would help."""


@dataclass(frozen=True)
class Outcome:
    """What a run is to be.

    Attributes:
        variant, config: of the run.
        lines: the plan with its reasons.
        costs: seconds for each image at each resolution; empty where nothing was measured.
    """

    variant: str
    config: Config
    lines: list[str]
    costs: dict[int, float]


def decide(config: Config, variant: str, wish: Wish, auto: bool, world: ProcessGroup, ranks: int) -> Outcome:
    """Settings of a new run, the same on all ranks; a collective. The first rank looks and measures.

    Args:
        config: as the flags have it.
        variant: of `config`.
        wish: what the user asks for.
        auto: whether the preset is auto; else only the length of the run is decided, from `wish.hours`.
        world: the ranks.
        ranks: number of ranks of the run, other than that of `world` in a dry run.

    Raises:
        ArgumentError: on every rank: the data cannot be opened, or the result is not valid.
    """
    resolved, _ = precision.resolve(config, variant, world)  # a collective: the decision itself runs on one rank
    result: Outcome | ArgumentError | None = None
    if world.main:
        try:
            measuring = dataclasses.replace(world, size=ranks)
            decided = _auto if auto else _hours
            result = decided(config, resolved, variant, wish, measuring)
            validate(result.config)
        except ArgumentError as error:
            result = error
    result = world.broadcast(result)
    if isinstance(result, ArgumentError):
        raise result
    assert result is not None
    return result


def stage_seconds(config: Config, variant: str, source: Source, world: ProcessGroup, seen: int) -> dict[int, float]:
    """Seconds for each image at the resolutions that a run has still to train, for the time left; empty where that is
    a single one or soon done. A collective."""
    config, _ = precision.resolve(config, variant, world)
    ahead = [stage for stage in stages_of(config) if stage.end > seen]
    if not world.main or len(ahead) < 2 or ahead[-1].end - seen < 1000 * _WORTH_MEASURING:
        return {}
    try:
        costs = stage_costs(config, source, world, [stage.resolution for stage in ahead])
    except MemoryError:
        return {}
    return {resolution: cost.seconds for resolution, cost in costs.items()}


def _open(config: Config, resolution: int) -> Source:
    return open_source(**{**source_arguments(config), "resolution": resolution})


def _auto(config: Config, resolved: Config, variant: str, wish: Wish, world: ProcessGroup) -> Outcome:
    """The preset auto: `wish.fixed` and what `choose` makes of the rest."""
    small = min(16, config.schedule.resolution)
    source = _open(config, small)
    seen = survey(source)
    pictures = Pictures(**seen.__dict__)
    machine = Machine(world.device.type, free_bytes(world.device), world.size)
    variant, _ = choose_variant(pictures, wish)
    costs: dict[Width, dict[int, StageCost]] = {}
    if wish.kimg is None or wish.kimg >= _WORTH_MEASURING:
        _measure(costs, "narrow", variant, pictures, machine, wish, resolved, source, world)
    decision = choose(pictures, machine, wish, costs)
    while costs and decision.width not in costs:  # a wider one was estimated: measure it, and decide again
        _measure(costs, decision.width, variant, pictures, machine, wish, resolved, source, world)
        decision = choose(pictures, machine, wish, costs)
    return _outcome(decision, config, costs.get(decision.width, {}), world)


def _measure(
    costs: dict[Width, dict[int, StageCost]],
    width: Width,
    variant: str,
    pictures: Pictures,
    machine: Machine,
    wish: Wish,
    resolved: Config,
    source: Source,
    world: ProcessGroup,
) -> None:
    chosen = replace(recipe(variant, width, pictures, machine, wish), system=dict(resolved.system.__dict__))
    for measured in costs:
        same = recipe(variant, measured, pictures, machine, wish)
        if (same.networks, same.schedule) == (chosen.networks, chosen.schedule):  # the user named their sizes
            costs[width] = costs[measured]
            return
    source.channels = chosen.data.channels or source.channels
    sizes = resolutions(pictures, chosen.networks.model, wish)
    try:
        costs[width] = stage_costs(chosen, source, world, sizes)
    except MemoryError as error:
        raise ArgumentError("--preset", "auto", f"nothing could be measured: {error}") from None


def _busy(costs: Mapping[int, StageCost], world: ProcessGroup) -> list[str]:
    """The line about other programs, where there is one."""
    line = busy([cost.scatter for cost in costs.values()], world.device) if costs else None
    return [] if line is None else [line]


def _outcome(decision: Decision, config: Config, costs: Mapping[int, StageCost], world: ProcessGroup) -> Outcome:
    """The decision over the parts of `config` that it leaves alone: the run, the machine and the data."""
    chosen = decision.config
    data = {name: getattr(chosen.data, name) for name in ("channels", "mirror", "augment")}
    final = Config(
        chosen.networks, chosen.objective, chosen.optimizer, chosen.schedule, config.data, config.run, config.system
    )
    seconds = {resolution: cost.seconds for resolution, cost in costs.items()}
    lines = [*(f"auto: {line}" for line in decision.reasons), *_busy(costs, world)]
    return Outcome(decision.variant, replace(final, data=data), lines, seconds)


def _hours(config: Config, resolved: Config, variant: str, wish: Wish, world: ProcessGroup) -> Outcome:
    """Another preset with --hours: its kimg is what fits into the time."""
    assert wish.seconds is not None
    source = _open(config, config.schedule.resolution)
    try:
        costs = stage_costs(resolved, source, world, _all_resolutions(config))
    except MemoryError as error:
        raise ArgumentError("--hours", wish.hours, f"nothing could be measured: {error}") from None
    kimg = kimg_within(config, costs, training_seconds(wish.seconds))
    config = replace(config, schedule={"kimg": kimg})
    resolution = stages_of(config)[-1].resolution
    time = readable_duration(run_seconds(config, costs))
    lines = [f"hours: {kimg:g} kimg to {resolution} px take {time}, by steps measured here"]
    if kimg < NEEDED_KIMG[resolution]:
        lines.append(f"warning: {resolution} px needs about {NEEDED_KIMG[resolution]} kimg: images stay rough")
    return Outcome(variant, config, [*lines, *_busy(costs, world)], {r: cost.seconds for r, cost in costs.items()})


def _all_resolutions(config: Config) -> list[int]:
    if config.networks.model != "pggan":
        return [config.schedule.resolution]
    first = config.schedule.first_resolution or 4
    return [2**i for i in range(2, 11) if first <= 2**i <= config.schedule.resolution]


def fixed_values(config: Config, given: frozenset[str]) -> dict[str, Any]:
    """The values of the fields that the user gave, by name."""
    sections = (getattr(config, name) for name in ("networks", "objective", "optimizer", "schedule", "data"))
    return {name: value for section in sections for name, value in section.__dict__.items() if name in given}
