"""Forecasts of a run's stages from made-up step times."""

from __future__ import annotations

from dataclasses import replace

import pytest
from timings import SMALL, step_times

from fastgan.cli.plan import make_forecaster
from fastgan.cli.train import parse
from fastgan.config import active_ranks
from fastgan.config.growth import Stage
from fastgan.data import open_source
from fastgan.planning.cost_model import Cluster, Link, UpdateTime, all_reduce_seconds
from fastgan.planning.forecast import Forecaster
from fastgan.planning.memory import Footprint
from fastgan.planning.step_times import Timing

SLOW = Link(bandwidth=1e8, latency=1e-3)
FAST = Link(bandwidth=1e9, latency=1e-4)
FREE = Link(bandwidth=1e12, latency=0.0)


def forecaster_of(flags: list[str], cluster: Cluster) -> Forecaster:
    config = parse(flags).config
    return make_forecaster(config, open_source("digits", config.schedule.resolution), cluster)


@pytest.mark.parametrize(
    ("batch", "world", "accumulation", "active"),
    [(64, 8, 1, 8), (64, 8, 2, 8), (4, 8, 1, 4), (4, 8, 2, 2), (6, 8, 4, None), (12, 8, 1, None), (2, 3, 4, None)],
)
def test_ranks_that_share_a_batch(batch: int, world: int, accumulation: int, active: int | None) -> None:
    assert active_ranks(batch, world, accumulation) == active


def test_forecast_of_each_stage() -> None:
    """1 kimg: 500 images at 4 px, 250 of fade-in and 250 after it at 8 px, in batches of 16 over 2 ranks."""
    flags = [*SMALL, "--batch", "16"]
    two = Cluster(2, 1, between=Link(bandwidth=1e6, latency=0.01), inside=FREE, overlap=False)
    times = step_times(flags, [(4, 8, False, 0.1), (8, 8, True, 0.3), (8, 8, False, 0.2)])
    stages = forecaster_of(flags, two).forecast(times)
    assert [stage.batch.stage.resolution for stage in stages] == [4, 8]
    assert [stage.batch.micro for stage in stages] == [8, 8]
    reductions = 2 * 2 * (0.01 + 500 / 1e6)  # of G and of D, two messages each of half of 1,000 bytes
    assert stages[0].cost.seconds == pytest.approx(500 / 16 * (0.1 + reductions))
    assert stages[1].cost.seconds == pytest.approx(250 / 16 * (0.3 + 0.2 + 2 * reductions))
    assert stages[1].cost.communication == pytest.approx(500 / 16 * reductions)


@pytest.mark.parametrize(("zero", "hosts"), [("0", [2, 1]), ("1", [2, 2])])
def test_active_ranks_average_among_themselves(zero: str, hosts: list[int]) -> None:
    """2 hosts of 4: the batch of 2 at 8 px is for two ranks of one host, which are a subgroup under ZeRO 0."""
    flags = [*SMALL, "--batch", "16", "--batch-at", "8", "2", "--zero", zero]
    eight, two = (Cluster(nodes, ranks, SLOW, FAST, overlap=False) for nodes, ranks in ((2, 4), (1, 2)))
    times = step_times(flags, [(4, 2, False, 0.1), (8, 1, True, 0.2), (8, 1, False, 0.2)])
    stages = forecaster_of(flags, eight).forecast(times)
    assert [stage.batch.active for stage in stages] == [8, 2]
    reducing = [eight, eight if zero == "1" else two]
    assert [cluster.nodes for cluster in reducing] == hosts
    for stage, cluster, compute in zip(stages, reducing, (0.1, 0.2), strict=True):
        assert stage.cost.seconds / stage.cost.steps == pytest.approx(compute + 2 * all_reduce_seconds(1000, cluster))


def test_a_stage_that_was_not_measured_is_estimated_from_operations_and_parameters() -> None:
    flags = [*SMALL, "--batch", "16", "--resolution", "16", "--kimg", "3", "--fmap-base", "64"]
    run = forecaster_of(flags, Cluster(1, 1, SLOW, FAST))
    stage_at = {batch.stage.resolution: batch.stage for batch in run.batches}

    def timing(px: int, micro: int, fading: bool) -> Timing:
        of = run.footprint(stage_at[px], micro, fading)
        d = UpdateTime(1e-6 * of.trained_d + 1e-9 * of.flops_d, ((1000, 0.0),))
        g = UpdateTime(1e-6 * of.trained_g + 1e-9 * of.flops_g, ((1000, 0.0),))
        return Timing(px, micro, fading, d, g)

    def seconds(px: int, micro: int, fading: bool) -> float:
        step = timing(px, micro, fading)
        return step.d.seconds + step.g.seconds

    times = replace(step_times(flags, []), timings=[timing(4, 16, False), timing(8, 16, True), timing(8, 16, False)])
    stages = run.forecast(times)
    assert [bool(stage.note) for stage in stages] == [False, False, True]
    assert stages[2].note == "estimated from operation and parameter counts of other stages"
    images = {fading: n / 16 for fading, n in stages[2].batch.parts()}
    assert set(images) == {True, False}
    expected = sum(n * seconds(16, 16, fading) for fading, n in images.items())
    assert stages[2].cost.seconds == pytest.approx(expected, rel=1e-6)
    one = run.forecast(replace(times, timings=times.timings[:1]))  # a single timing: by operations alone
    low, high = (run.footprint(stage_at[px], 16, False) for px in (4, 8))
    assert one[1].cost.seconds / one[1].cost.steps > times.timings[0].d.seconds * high.flops_d / low.flops_d
    with pytest.raises(LookupError, match="4"):
        run.forecast(step_times(flags, []))


def test_steps_that_are_too_large_or_too_slow_are_not_measured() -> None:
    """Four stages of which the third does not fit, the fourth takes too long and one size runs out of memory."""
    config = parse([*SMALL, "--resolution", "32", "--batch", "4"]).config
    stages = [Stage(px, 0, 0, 1000) for px in (4, 8, 16, 32)]
    measured: list[tuple[int, int, bool]] = []

    def footprint(stage: Stage, micro: int, fading: bool) -> Footprint:
        flops = 10**9 * (20 if stage.resolution == 32 else 1)
        return Footprint(2**30 * (8 if stage.resolution == 16 else 1), 1, 1, 1, 1, flops, flops)

    def time_step(resolution: int, micro: int, fading: bool) -> Timing:
        measured.append((resolution, micro, fading))
        if (resolution, micro) == (8, 4):
            raise MemoryError
        return Timing(resolution, micro, fading, UpdateTime(1.0, ((4, 0.0),)), UpdateTime(1.0, ((4, 0.0),)))

    run = Forecaster(config, stages, Cluster(1, 1, SLOW, FAST), footprint, own_reducer=True)
    results = list(run.measure(time_step, lambda: 4.0 * 2**30, 5.0, smaller=True))
    assert measured == [(4, 1, False), (4, 4, False), (8, 1, False), (8, 4, False)]
    assert [result for result in results if isinstance(result, str)] == [
        "8 px, 4 per rank: not measured, it ran out of memory",
        "16 px, 1 per rank: not measured, it needs 8.0 GiB",
        "16 px, 4 per rank: not measured, it needs 8.0 GiB",
        "32 px, 1 per rank: not measured, a step would take about 40 s",
        "32 px, 4 per rank: not measured, a step would take about 40 s",
    ]
