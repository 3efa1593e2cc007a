"""Time left, on simulated runs: what is shown from a tenth of the run on, against when the run ends."""

from __future__ import annotations

import random

import pytest

from fastgan.config.growth import Stage, stages
from fastgan.planning.time_left import TimeLeft


def simulate(
    planned: list[Stage], true: dict[int, float], costs: dict[int, float] | None, *, noise: float = 0.0, start: int = 0
) -> list[tuple[float, float, float]]:
    """(share of the run's images, seconds shown as left, seconds that were left) at each of 100 lines of the log.

    Each line takes 0.1 s, and a checkpoint at each fifth line 2 s.
    """
    draws, left, clock, rows = random.Random(0), TimeLeft(planned, costs), 0.0, []
    total = planned[-1].end
    seen = start
    for line in range(1, 101):
        end = start + (total - start) * line // 100
        seconds = 0.1
        for stage in planned:
            images = max(0, min(end, stage.end) - max(seen, stage.start))
            seconds += images * true[stage.resolution] * draws.uniform(1 - noise, 1 + noise)
        besides = 2.0 if line % 5 == 0 else 0.0
        clock += seconds + besides
        left.observe(seen, end, seconds, besides)
        seen = end
        rows.append(((end - start) / (total - start), left.seconds(end), clock))
    return [(share, shown, clock - at) for share, shown, at in rows]


PLANNED = stages(64, 400.0, progressive=True, grown_at=0.3)
TRUE = {4: 0.0015, 8: 0.004, 16: 0.009, 32: 0.025, 64: 0.08}


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("error", [1.0, 0.9, 1.1])
def test_within_a_fifth_from_a_tenth_of_the_run_on(noise: float, error: float) -> None:
    """Steps were measured on a machine that is otherwise idle, a tenth too fast, or too slow."""
    measured = {resolution: seconds * error for resolution, seconds in TRUE.items()}
    for share, shown, real in simulate(PLANNED, TRUE, measured, noise=noise):
        if 0.1 <= share <= 0.95:
            assert shown == pytest.approx(real, rel=0.2), share


def test_the_present_speed_alone_would_be_wrong_by_far() -> None:
    """A tenth into the run it is at 16 px, and 64 px take nine times as long."""
    share, shown, real = simulate(PLANNED, TRUE, TRUE)[9]
    images = PLANNED[-1].end * (1 - share)
    assert images * TRUE[8] < real / 5 and shown > 0.8 * real


def test_a_run_that_is_twice_as_slow_as_measured_is_found_out() -> None:
    slow = {resolution: 2 * seconds for resolution, seconds in TRUE.items()}
    rows = [row for row in simulate(PLANNED, slow, TRUE) if 0.35 <= row[0] <= 0.95]
    assert all(shown == pytest.approx(real, rel=0.2) for _, shown, real in rows)


def test_one_stage_needs_no_costs() -> None:
    planned = [Stage(32, 0, 0, 60_000)]
    for share, shown, real in simulate(planned, TRUE, None, noise=0.2):
        if 0.1 <= share <= 0.95:
            assert shown == pytest.approx(real, rel=0.2)


def test_a_resumed_run_counts_what_is_ahead_alone() -> None:
    ahead = {64: TRUE[64]}
    for share, shown, real in simulate(PLANNED, TRUE, ahead, start=200_000):
        if 0.1 <= share <= 0.95:
            assert shown == pytest.approx(real, rel=0.2)


def test_without_costs_later_stages_count_more() -> None:
    left = TimeLeft(PLANNED)
    assert left.seconds(0) == 0.0
    left.observe(0, 1000, 1.0)
    assert left.seconds(1000) > 10 * (PLANNED[-1].end - 1000) / 1000


def test_no_time_is_left_after_a_last_batch_beyond_the_end() -> None:
    left = TimeLeft(PLANNED, TRUE)
    left.observe(0, 1000, 1.0, 2.0)
    assert left.seconds(PLANNED[-1].end + 24) == 0.0
