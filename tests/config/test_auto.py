"""The preset auto as a pure function: twelve folders with what must be decided for them, and properties of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.config import batch_at, to_dict, validate
from fastgan.config.auto import (
    LONGEST_KIMG,
    NEEDED_KIMG,
    WIDTHS,
    Decision,
    Machine,
    Pictures,
    StageCost,
    Width,
    Wish,
    choose,
    kimg_within,
    largest_resolution,
    run_seconds,
    training_seconds,
)
from fastgan.config.growth import stages_of
from fastgan.config.variants import VARIANTS

GIB = 2**30
CPU, GPU = Machine("cpu", 8 * GIB), Machine("cuda", 40 * GIB)


def costs_of(machine: Machine, speed: float = 1.0) -> dict[Width, dict[int, StageCost]]:
    """Round numbers as of two cores (pggan: 60 ms an image at 64 px), and a GPU that is fifty times as fast."""
    per_second = speed * (50.0 if machine.kind == "cuda" else 1.0)
    factors = zip(WIDTHS, (1.0, 3.0, 10.0, 40.0), strict=True)
    return {
        width: {
            2**i: StageCost(factor * (0.001 + 0.06 * 3.0 ** (i - 6)) / per_second, factor * 4.0**i * 1e3)
            for i in range(2, 11)
        }
        for width, factor in factors
    }


@dataclass(frozen=True)
class Folder:
    """A folder of pictures with a time, and the decisions that it must get."""

    pictures: Pictures
    wish: Wish
    expected: Mapping[str, Any]
    machine: Machine = CPU
    speed: float = 1.0


FOLDERS = {
    "300 stickers with alpha, ten minutes": Folder(
        Pictures(300, 256, alpha=0.98),
        Wish(hours=1 / 6),
        {"variant": "pggan", "width": "narrow", "resolution": 16, "augment": "ada", "mirror": True},
    ),
    "300 photographs of 1024 px, two days": Folder(
        Pictures(300, 1024, aspect=1.5),
        Wish(hours=48),
        {"variant": "pggan", "width": "narrow", "resolution": 128, "augment": "ada", "mirror": True},
    ),
    "1,000 drawings of letters, an hour": Folder(
        Pictures(1000, 64, channels=1, asymmetry=40.0),
        Wish(hours=1),
        {"variant": "pggan", "resolution": 32, "mirror": False, "augment": "ada", "width": "narrow"},
    ),
    "gray pictures stored in color": Folder(
        Pictures(2000, 140, gray=True), Wish(hours=8), {"channels": 1, "resolution": 64, "width": "narrow"}
    ),
    "60,000 of 28 px, twenty minutes": Folder(
        Pictures(60_000, 28, channels=1, num_classes=10),
        Wish(hours=1 / 3),
        {"variant": "dcgan", "resolution": 32, "augment": "none", "mirror": False, "batch": 64, "grown_at": None},
        speed=20.0,
    ),
    "50,000 of 32 px in ten classes, sagan": Folder(
        Pictures(50_000, 32, num_classes=10),
        Wish("sagan", hours=8),
        {"variant": "sagan", "conditional": True, "resolution": 32, "augment": "none", "fade_kimg": None},
    ),
    "50,000 of 256 px, two days": Folder(
        Pictures(50_000, 256),
        Wish(hours=48),
        {"variant": "pggan", "resolution": 128, "augment": "none", "mirror": False},
    ),
    "50,000 of 1024 px, two days of a GPU": Folder(
        Pictures(50_000, 1024),
        Wish(hours=48),
        {"variant": "pggan", "resolution": 512, "width": "narrow", "batch": 64},
        GPU,
    ),
    "10,000 of 128 px, a day of a GPU": Folder(
        Pictures(10_000, 128),
        Wish(hours=24),
        {"resolution": 128, "width": "wide", "augment": "ada", "mirror": True, "fmap_max": 256},
        GPU,
    ),
    "no time named: a night": Folder(
        Pictures(3000, 100), Wish(), {"variant": "pggan", "resolution": 64, "width": "narrow"}
    ),
    "a length in kimg": Folder(
        Pictures(3000, 512), Wish(fixed={"kimg": 500.0}), {"resolution": 128, "kimg": 500.0, "width": "narrow"}
    ),
    "everything named": Folder(
        Pictures(5000, 200),
        Wish("dcgan", hours=2, fixed={"resolution": 128, "batch": 24, "lr_g": 0.5, "augment": "none", "mirror": False}),
        {"variant": "dcgan", "resolution": 128, "batch": 24, "lr_g": 0.5, "augment": "none", "mirror": False},
    ),
}


def flat(decision: Decision) -> dict[str, Any]:
    sections = to_dict(decision.config).values()
    values = {name: value for section in sections for name, value in section.items()}
    return {**values, "variant": decision.variant, "width": decision.width}


@pytest.mark.parametrize("name", FOLDERS)
def test_twelve_folders(name: str) -> None:
    folder = FOLDERS[name]
    decision = choose(folder.pictures, folder.machine, folder.wish, costs_of(folder.machine, folder.speed))
    found = flat(decision)
    assert {key: found[key] for key in folder.expected} == folder.expected
    validate(decision.config)
    if folder.wish.seconds is not None:
        assert decision.seconds is not None and decision.seconds <= folder.wish.seconds
        assert decision.seconds >= 0.85 * training_seconds(folder.wish.seconds)


def test_reasons_say_what_the_next_resolution_would_take() -> None:
    text = "\n".join(choose(Pictures(3000, 128), CPU, Wish(hours=8), costs_of(CPU)).reasons)
    assert "pictures: 3,000, 128 px" in text and "64 px, " in text
    assert "128 px would take" in text and "for the 400 kimg it needs" in text
    assert "augment ada: fewer than 20,000 pictures" in text and "looks the same in a mirror" in text


def test_what_is_too_short_and_what_has_alpha_is_said() -> None:
    pictures = Pictures(300, 64, alpha=0.5, aspect=1.5, gray=True)
    text = "\n".join(choose(pictures, CPU, Wish(hours=0.02), costs_of(CPU)).reasons)
    for words in ("warning: 16 px needs about 25 kimg", "alpha: 50%", "1.5 times the shorter", "stored in color"):
        assert words in text


@pytest.mark.parametrize(
    ("side", "resolution"), [(8, 8), (28, 32), (48, 32), (52, 64), (96, 64), (103, 128), (4000, 1024)]
)
def test_pictures_are_hardly_enlarged(side: int, resolution: int) -> None:
    assert largest_resolution(Pictures(1000, side)) == resolution
    assert largest_resolution(Pictures(1000, None)) == 1024


def test_batches_fit_into_memory() -> None:
    small = Machine("cuda", 2e9)
    wish = Wish("pggan", hours=48, fixed={"resolution": 1024})
    config = choose(Pictures(1000, 1024), small, wish, costs_of(small)).config
    used = [stage.resolution for stage in stages_of(config)]
    table = costs_of(small)["narrow"]
    assert all(batch_at(config.schedule, r) * table[r].bytes <= 2e9 for r in used if r < 1024)
    assert batch_at(config.schedule, 1024) == 4 < batch_at(config.schedule, 4)


def test_kimg_within_is_what_fits() -> None:
    table = costs_of(CPU)["narrow"]
    config = choose(Pictures(1000, 64), CPU, Wish(hours=8), costs_of(CPU)).config
    for seconds in (1.0, 100.0, 30_000.0):
        kimg = kimg_within(config, table, seconds)
        for factor, fits in ((1.0, True), (1.02, False)):
            longer = choose(Pictures(1000, 64), CPU, Wish(fixed={"kimg": factor * kimg}), {}).config
            assert (run_seconds(longer, table) <= seconds) is fits or longer.schedule.resolution != 64
    assert kimg_within(config, table, 1e12) == LONGEST_KIMG


def test_nothing_measured_needs_a_length() -> None:
    decision = choose(Pictures(500, 64), CPU, Wish(fixed={"kimg": 1.0}), {})
    assert decision.seconds is None and decision.config.schedule.resolution == 16


pictures = st.builds(
    Pictures,
    count=st.integers(50, 100_000),
    side=st.none() | st.integers(4, 3000),
    channels=st.sampled_from([1, 3]),
    alpha=st.floats(0, 1),
    asymmetry=st.floats(0, 50),
    num_classes=st.integers(0, 50),
)
machines = st.builds(
    Machine, kind=st.sampled_from(["cpu", "cuda"]), memory=st.floats(1e8, 1e11), ranks=st.sampled_from([1, 2, 3, 8])
)
speeds = st.floats(0.02, 50)
variants = st.none() | st.sampled_from(sorted(VARIANTS))


@settings(max_examples=50, deadline=None)
@given(pictures, machines, variants, st.floats(0.01, 200), speeds)
def test_every_decision_is_a_run_that_fits(
    of: Pictures, machine: Machine, variant: str | None, hours: float, speed: float
) -> None:
    decision = choose(of, machine, Wish(variant, hours), costs_of(machine, speed))
    validate(decision.config)
    s = decision.config.schedule
    assert s.resolution <= largest_resolution(of)
    assert all(batch_at(s, stage.resolution) % machine.ranks == 0 for stage in stages_of(decision.config))
    assert decision.seconds is not None
    assert decision.seconds <= training_seconds(hours * 3600) or s.kimg == 0.001
    assert (s.kimg >= NEEDED_KIMG[s.resolution]) or any("stay rough" in line for line in decision.reasons)


@settings(max_examples=50, deadline=None)
@given(pictures, machines, variants, st.floats(0.01, 200), st.floats(1, 20), speeds)
def test_more_time_or_a_faster_machine_is_never_less(
    of: Pictures, machine: Machine, variant: str | None, hours: float, factor: float, speed: float
) -> None:
    before = choose(of, machine, Wish(variant, hours), costs_of(machine, speed))
    for after in (
        choose(of, machine, Wish(variant, hours * factor), costs_of(machine, speed)),
        choose(of, machine, Wish(variant, hours), costs_of(machine, speed * factor)),
    ):
        assert after.config.schedule.resolution >= before.config.schedule.resolution
        if after.config.schedule.resolution == before.config.schedule.resolution:
            assert WIDTHS.index(after.width) >= WIDTHS.index(before.width)
            if after.width == before.width:
                assert after.config.schedule.kimg >= before.config.schedule.kimg


@settings(max_examples=60, deadline=None)
@given(pictures, machines, variants, st.floats(0.1, 1e4), st.floats(1, 20))
def test_more_kimg_never_lower_the_resolution(
    of: Pictures, machine: Machine, variant: str | None, kimg: float, factor: float
) -> None:
    sizes = [
        choose(of, machine, Wish(variant, fixed={"kimg": k}), costs_of(machine)).config.schedule.resolution
        for k in (kimg, kimg * factor)
    ]
    assert sizes == sorted(sizes)


@settings(max_examples=60, deadline=None)
@given(pictures, machines, st.floats(0.01, 200), st.data())
def test_what_is_given_is_kept(of: Pictures, machine: Machine, hours: float, data: st.DataObject) -> None:
    choices = {
        "resolution": st.sampled_from([16, 32, 64]),
        "batch": st.integers(1, 64),
        "batch_at": st.just({}),
        "lr_g": st.floats(1e-5, 1),
        "ema_decay": st.floats(0, 0.99),
        "mirror": st.booleans(),
        "augment": st.sampled_from(["none", "ada", "diffaugment"]),
        "latent": st.integers(1, 512),
        "fmap_max": st.integers(1, 64),
        "width": st.integers(8, 64),
    }
    values = data.draw(st.fixed_dictionaries({}, optional=choices))
    found = flat(choose(of, machine, Wish(None, hours, values), costs_of(machine)))
    sections = to_dict(choose(of, machine, Wish(None, hours, values), costs_of(machine)).config)
    found["width"] = sections["networks"]["width"]
    assert {key: found[key] for key in values} == values
