from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fastgan.config.growth import Stage, stage_at, stages
from fastgan.config.variants import VARIANTS
from fastgan.training.networks import inherit


def boundaries(planned: list[Stage]) -> list[tuple[int, int, int, int]]:
    return [(s.resolution, s.start, s.fade_end, s.end) for s in planned]


def test_not_progressive_is_one_stage_without_a_fade() -> None:
    (stage,) = stages(64, 12.3456, progressive=False)
    assert stage == Stage(64, 0, 0, 12_346)
    assert stage.alpha(0) == stage.alpha(10**9) == 1.0


def test_equal_shares_by_default() -> None:
    assert boundaries(stages(32, 240, progressive=True)) == [
        (4, 0, 0, 60_000),
        (8, 60_000, 90_000, 120_000),
        (16, 120_000, 150_000, 180_000),
        (32, 180_000, 210_000, 240_000),
    ]


def test_paper_schedule() -> None:
    s = VARIANTS["pggan"].config("paper").schedule
    planned = stages(s.resolution, s.kimg, progressive=True, fade_kimg=s.fade_kimg, stable_kimg=s.stable_kimg)
    kimg = [(r, a / 1000, b / 1000, c / 1000) for r, a, b, c in boundaries(planned)]
    assert kimg == [
        (4, 0, 0, 600),
        (8, 600, 1200, 1800),
        (16, 1800, 2400, 3000),
        (32, 3000, 3600, 4200),
        (64, 4200, 4800, 5400),
        (128, 5400, 6000, 6600),
        (256, 6600, 7200, 7800),
        (512, 7800, 8400, 9000),
        (1024, 9000, 9600, 12_000),
    ]


def test_the_last_stage_trains_to_the_end() -> None:
    planned = stages(8, 100, progressive=True, fade_kimg=10, stable_kimg=20)
    assert boundaries(planned) == [(4, 0, 0, 20_000), (8, 20_000, 30_000, 100_000)]


@pytest.mark.parametrize(
    ("kimg", "expected"),
    [
        (15, [(4, 0, 0, 15_000)]),
        (20, [(4, 0, 0, 20_000)]),  # a stage that would begin at the end is left out
        (20.001, [(4, 0, 0, 20_000), (8, 20_000, 30_000, 20_001)]),
        (25, [(4, 0, 0, 20_000), (8, 20_000, 30_000, 25_000)]),
    ],
)
def test_a_short_run_is_cut(kimg: float, expected: list[tuple[int, int, int, int]]) -> None:
    assert boundaries(stages(32, kimg, progressive=True, fade_kimg=10, stable_kimg=20)) == expected


def test_one_of_the_lengths_alone() -> None:
    assert boundaries(stages(8, 100, progressive=True, fade_kimg=10)) == [
        (4, 0, 0, 10_000),
        (8, 10_000, 20_000, 100_000),
    ]
    # A quarter of the run is the fade's share of 100 kimg over two stages.
    assert boundaries(stages(8, 100, progressive=True, stable_kimg=30))[1] == (8, 30_000, 55_000, 100_000)


def test_growing_takes_a_share_of_the_run() -> None:
    assert boundaries(stages(32, 150, progressive=True, grown_at=0.2)) == [
        (4, 0, 0, 5_000),
        (8, 5_000, 10_000, 15_000),
        (16, 15_000, 20_000, 25_000),
        (32, 25_000, 30_000, 150_000),
    ]
    assert boundaries(stages(8, 100, progressive=True, fade_kimg=10, grown_at=0.2)) == boundaries(
        stages(8, 100, progressive=True, fade_kimg=10)
    )
    assert boundaries(stages(4, 100, progressive=True, grown_at=0.2)) == [(4, 0, 0, 100_000)]


def test_no_fade() -> None:
    planned = stages(16, 30, progressive=True, fade_kimg=0, stable_kimg=10)
    assert boundaries(planned) == [(4, 0, 0, 10_000), (8, 10_000, 10_000, 20_000), (16, 20_000, 20_000, 30_000)]
    assert [stage.alpha(stage.start) for stage in planned] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kimg", [0.1, 1.0, 7.77, 240, 12_000])
@pytest.mark.parametrize("resolution", [4, 8, 64, 1024])
def test_stages_tile_the_run(kimg: float, resolution: int) -> None:
    planned = stages(resolution, kimg, progressive=True)
    assert planned[0].start == 0 and planned[-1].end == round(1000 * kimg) and planned[-1].resolution == resolution
    for before, after in itertools.pairwise(planned):
        assert before.end == after.start and after.resolution == 2 * before.resolution
    assert all(s.start <= s.fade_end <= s.end for s in planned)


def test_alpha_ramps_from_0_to_1() -> None:
    first, second = stages(8, 40, progressive=True)
    assert second == Stage(8, 20_000, 30_000, 40_000)
    assert [second.alpha(i) for i in (20_000, 22_500, 25_000, 29_999, 30_000, 35_000)] == [
        0.0, 0.25, 0.5, 0.9999, 1.0, 1.0,
    ]  # fmt: skip
    assert second.alpha(10_000) == 0.0
    assert first.alpha(0) == 1.0


def test_stage_at_the_boundaries() -> None:
    planned = stages(16, 60, progressive=True)
    at = {0: 4, 19_999: 4, 20_000: 8, 39_999: 8, 40_000: 16, 59_999: 16, 60_000: 16, 10**9: 16}
    assert {images: stage_at(planned, images).resolution for images in at} == at


def test_stage_at_passes_over_empty_stages() -> None:
    planned = stages(16, 10, progressive=True, fade_kimg=0, stable_kimg=0)
    assert stage_at(planned, 0).resolution == 16


def test_inherit_keeps_only_the_new_level() -> None:
    small = nn.ModuleDict({"4": nn.Linear(2, 2)})
    grown = nn.ModuleDict({"8": nn.Linear(2, 2), "4": nn.Linear(2, 2)})
    initial = {name: p.detach().clone() for name, p in grown["8"].named_parameters()}
    inherit(grown, small.state_dict())
    assert torch.equal(grown["4"].weight, small["4"].weight) and torch.equal(grown["4"].bias, small["4"].bias)
    assert all(torch.equal(p, initial[name]) for name, p in grown["8"].named_parameters())


def test_inherit_refuses_what_has_no_place() -> None:
    with pytest.raises(RuntimeError, match=r"the grown network has no 2.weight"):
        inherit(nn.ModuleDict({"4": nn.Linear(2, 2)}), {"2.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        inherit(nn.ModuleDict({"4": nn.Linear(2, 2)}), {"4.weight": torch.zeros(3, 2)})
