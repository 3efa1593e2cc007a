"""The model of communication against hand computation, the trainer's shares, and `fastgan plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan.cli import main
from fastgan.cli.train import parse
from fastgan.config import active_ranks
from fastgan.data import open_source
from fastgan.planning.communication import (
    Cluster,
    Link,
    NetworkTime,
    all_reduce_seconds,
    pack,
    reduction_seconds,
    ring_seconds,
    stage_seconds,
    step_seconds,
)
from fastgan.training.dry_run import footprint
from fastgan.training.factory import plan
from fastgan.training.forecast import Planner
from fastgan.training.step_measurement import SCHEMA, StepTimes, Timing, recipe, write

GIGABIT = Link(bandwidth=1e8, latency=1e-3)
ALONE = Link(bandwidth=1e12, latency=0.0)
SMALL = "--variant pggan --data digits --batch 32 --fmap-base 32 --fmap-max 8 --latent 8 --resolution 8".split()
SMALL += "--kimg 1 --fade-kimg 0.25 --stable-kimg 0.5".split()


def cluster(nodes: int, per_node: int = 1, **changes: Any) -> Cluster:
    return replace(Cluster(nodes, per_node, between=GIGABIT, inside=Link(1e9, 1e-4)), **changes)


def test_ring() -> None:
    # 4 ranks, 8 MB: 2 (4-1) messages of 2 MB at 100 MB/s, 20 ms each, and 1 ms before each.
    assert ring_seconds(8e6, 4, GIGABIT) == pytest.approx(6 * (0.020 + 0.001))
    assert ring_seconds(8e6, 1, GIGABIT) == 0.0


def test_hierarchical_ring() -> None:
    # Inside: 2 (2-1) messages of 4 MB at 1 GB/s; between 4 hosts as a ring of 8 MB.
    inside = 2 * (4e6 / 1e9 + 1e-4)
    assert all_reduce_seconds(8e6, cluster(4, 2)) == pytest.approx(inside + 6 * 0.021)
    assert all_reduce_seconds(8e6, cluster(1, 2)) == pytest.approx(inside)


def test_buckets_close_when_they_are_full() -> None:
    assert pack([3, 3, 3, 9, 1], limit=6) == [[0, 1], [2, 3], [4]]
    assert pack([20], limit=6) == [[0]] and pack([], limit=6) == []


MB16 = 16 * 2**20


@pytest.mark.parametrize(
    ("before", "exposed"),
    [
        ((10.0, 0.0), 1.0),  # the first bucket was sent long before, the last begins at the end
        ((0.5, 0.0), 1.5),  # half of the first is still to be sent at the end
        ((0.0, 0.0), 2.0),  # nothing overlaps
        ((10.0, 9.0), 0.0),  # all was sent before the end
    ],
)
def test_buckets_overlap_with_what_is_left_of_the_backward(before: tuple[float, float], exposed: float) -> None:
    # Two hosts: 2 messages of half a bucket, 1 s for a bucket.
    of = cluster(2, between=Link(bandwidth=MB16, latency=0.0), inside=ALONE)
    gradients = [(MB16, before[0]), (MB16, before[1])]
    assert reduction_seconds(gradients, of) == pytest.approx((2.0, exposed))
    assert reduction_seconds(gradients, replace(of, overlap=False)) == pytest.approx((2.0, 2.0))
    assert reduction_seconds(gradients, cluster(1)) == (0.0, 0.0)


def test_a_step_reduces_once_for_each_optimizer_step() -> None:
    of = cluster(2, between=Link(bandwidth=1e6, latency=0.0), overlap=False)
    d, g = NetworkTime(2.0, ((1_000_000, 0.0),)), NetworkTime(1.0, ((500_000, 0.0),))
    step = step_seconds(d, g, of, n_critic=5, accumulation=3)
    assert step.communication == step.exposed == pytest.approx(5 * 1.0 + 0.5)
    assert step.seconds == pytest.approx(3 * (5 * 2.0 + 1.0) + 5.5)
    # D's second of sending has 0.3 s of the generator to get through in, G's half a second more than it needs.
    leading = step_seconds(replace(d, lead=0.7), replace(g, lead=0.3), of, n_critic=5, accumulation=3)
    assert leading.exposed == pytest.approx(5 * 0.7) and leading.communication == step.communication
    assert leading.seconds == pytest.approx(3 * (5 * 2.0 + 1.0) + 3.5)
    at_once = step_seconds(replace(d, lead=0.7), replace(g, lead=0.3), of, n_critic=5, accumulation=3, deferred=False)
    assert at_once == step
    # 6,000 images fade and 4,000 do not; a generator step takes 5 batches of 8.
    stable = step_seconds(d, g, cluster(1), n_critic=5, accumulation=3)
    stage = stage_seconds([(6000.0, step), (4000.0, stable), (0.0, step)], batch=8, n_critic=5)
    assert stage.steps == 250
    assert stage.seconds == pytest.approx(150 * 38.5 + 100 * 33.0)


@pytest.mark.parametrize(
    ("batch", "world", "accumulation", "working"),
    [(64, 8, 1, 8), (64, 8, 2, 8), (4, 8, 1, 4), (4, 8, 2, 2), (6, 8, 4, None), (12, 8, 1, None), (2, 3, 4, None)],
)
def test_ranks_that_share_a_batch(batch: int, world: int, accumulation: int, working: int | None) -> None:
    assert active_ranks(batch, world, accumulation) == working


def test_footprint_against_hand_computation() -> None:
    flags = "--variant gan --width 16 --latent 8 --resolution 8 --batch 4 --optimizer adam".split()
    config = parse(flags).config
    source = open_source("digits", 8)
    of = footprint(config, source, plan(config)[0], 4, 1, fading=False)
    again = footprint(config, source, plan(config)[0], 8, 1, fading=False)
    assert (of.g, of.d) == (8 * 16 + 16 + 16 * 16 + 16 + 16 * 64 + 64, again.d)
    # All products are in proportion to the batch: G's forward, and D's forward, backward to weights and to inputs.
    assert again.flops_g == 2 * of.flops_g > 0 and again.flops_d == 2 * of.flops_d > 0
    products_g = 8 * 16 + 16 * 16 + 16 * 64
    assert of.flops_g > 3 * 2 * 4 * products_g - 2 * 4 * 8 * 16


def times_of(argv: list[str], entries: list[tuple[int, int, bool, float]]) -> StepTimes:
    config = parse(argv).config
    timings = [
        Timing(px, micro, fading, NetworkTime(0.75 * s, ((1000, 0.0),)), NetworkTime(0.25 * s, ((1000, 0.0),)))
        for px, micro, fading, s in entries
    ]
    return StepTimes(SCHEMA, "a device", torch.__version__, recipe(config, 1), timings)


@pytest.mark.parametrize(
    ("micro", "seconds", "note"),
    [(4, 1.0, ""), (10, 2.0, "on a line"), (16, 3.0, ""), (28, 5.0, "on a line"), (1, 0.5, "on a line")],
)
def test_times_between_and_beyond_what_was_measured(micro: int, seconds: float, note: str) -> None:
    times = times_of(SMALL, [(8, 4, False, 1.0), (8, 16, False, 3.0)])
    found, how = times.at(8, micro, False) or (None, "")
    assert found is not None and found.d.seconds + found.g.seconds == pytest.approx(seconds)
    assert how.startswith(note) and bool(how) == bool(note)
    assert times.at(16, micro, False) is None


def test_rows_of_a_plan() -> None:
    """1 kimg: 500 images at 4 px, 250 of fade and 250 after at 8 px, in batches of 16 over 2 ranks."""
    flags = [*SMALL, "--batch", "16"]
    config = parse(flags).config
    two = cluster(2, between=Link(bandwidth=1e6, latency=0.01), inside=ALONE, overlap=False)
    times = times_of(flags, [(4, 8, False, 0.1), (8, 8, True, 0.3), (8, 8, False, 0.2)])
    rows = Planner(config, open_source("digits", 8), two).rows(times)
    assert [row.share.stage.resolution for row in rows] == [4, 8]
    assert [row.share.micro for row in rows] == [8, 8]
    reductions = 2 * 2 * (0.01 + 500 / 1e6)  # of G and of D, two messages each of half of 1,000 bytes
    assert rows[0].time.seconds == pytest.approx(500 / 16 * (0.1 + reductions))
    assert rows[1].time.seconds == pytest.approx(250 / 16 * (0.3 + 0.2 + 2 * reductions))
    assert rows[1].time.communication == pytest.approx(500 / 16 * reductions)


@pytest.mark.parametrize(("zero", "hosts"), [("0", [2, 1]), ("1", [2, 2])])
def test_ranks_at_work_average_among_themselves(zero: str, hosts: list[int]) -> None:
    """2 hosts of 4: at 8 px the batch of 2 is for two ranks of one host, which under ZeRO 0 are a group."""
    flags = [*SMALL, "--batch", "16", "--batch-at", "8", "2", "--zero", zero]
    planner = Planner(parse(flags).config, open_source("digits", 8), cluster(2, 4, overlap=False))
    rows = planner.rows(times_of(flags, [(4, 2, False, 0.1), (8, 1, True, 0.2), (8, 1, False, 0.2)]))
    assert [row.share.active for row in rows] == [8, 2]
    alike = [cluster(2, 4), cluster(2, 4) if zero == "1" else cluster(1, 2)]
    assert [of.nodes for of in alike] == hosts
    for row, of, computing in zip(rows, alike, (0.1, 0.2), strict=True):
        assert row.time.step == pytest.approx(computing + 2 * all_reduce_seconds(1000, of))


def test_hosts_of_the_first_ranks() -> None:
    of = cluster(4, 8)
    sizes = {n: (of.first(n).nodes, of.first(n).per_node) for n in (1, 8, 12, 16, 32)}
    assert sizes == {1: (1, 1), 8: (1, 8), 12: (2, 8), 16: (2, 8), 32: (4, 8)}


def test_a_stage_that_was_not_measured_goes_by_operations_and_parameters() -> None:
    flags = [*SMALL, "--batch", "16", "--resolution", "16", "--kimg", "3", "--fmap-base", "64"]
    planner = Planner(parse(flags).config, open_source("digits", 16), cluster(1))
    stages = plan(planner.config)

    def seconds(px: int, micro: int, fading: bool) -> float:
        of = planner.footprint(next(s for s in stages if s.resolution == px), micro, fading)
        return 1e-6 * (of.trained_d + of.trained_g) + 1e-9 * (of.flops_d + of.flops_g)

    def timing(px: int, micro: int, fading: bool) -> Timing:
        of = planner.footprint(next(s for s in stages if s.resolution == px), micro, fading)
        d = NetworkTime(1e-6 * of.trained_d + 1e-9 * of.flops_d, ((1000, 0.0),))
        g = NetworkTime(1e-6 * of.trained_g + 1e-9 * of.flops_g, ((1000, 0.0),))
        return Timing(px, micro, fading, d, g)

    times = replace(times_of(flags, []), timings=[timing(4, 16, False), timing(8, 16, True), timing(8, 16, False)])
    rows = planner.rows(times)
    assert [bool(row.note) for row in rows] == [False, False, True] and "operations and parameters" in rows[2].note
    images = {fades: n / 16 for fades, n in rows[2].share.parts()}
    assert set(images) == {True, False}
    expected = sum(n * seconds(16, 16, fades) for fades, n in images.items())
    assert rows[2].time.seconds == pytest.approx(expected, rel=1e-6)
    one = planner.rows(replace(times, timings=times.timings[:1]))  # a single time goes by operations alone
    low, high = (planner.footprint(stages[i], 16, False) for i in (0, 1))
    assert one[1].time.step > times.timings[0].d.seconds * high.flops_d / low.flops_d
    with pytest.raises(LookupError, match="4"):
        planner.rows(times_of(flags, []))


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plan_measures_writes_and_reads(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", *SMALL, "--batch", "8", "--nodes", "2", "--gpus-per-node", "1", "--bandwidth", "0.001"]
    assert main.main([*command, "--measure-seconds", "0.2", "--write-step-times", "times.json"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert "1 kimg to 8 px on 2 x 1 = 2 ranks" in first[0] and "thread" in first[1]
    assert "0.001 GB/s and 5 us between hosts" in first[2]
    content = json.loads((working_folder / "times.json").read_text())
    assert {(t["resolution"], t["micro"], t["fading"]) for t in content["timings"]} == {
        (px, micro, fading) for px, fading in ((4, False), (8, True), (8, False)) for micro in (1, 4)
    }
    sent = sum(size for size, _ in content["timings"][0]["d"]["gradients"])
    config = parse(SMALL).config
    assert sent == 4 * footprint(config, open_source("digits", 8), plan(config)[0], 1, 1, fading=False).trained_d
    assert main.main([*command, "--step-times", "times.json"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[1].endswith(", times.json") and again[2:] == first[2:]
    row = next(line for line in again if line.startswith("    8"))
    assert row.split()[:5] == ["8", "0.5", "8", "2", "4"] and row.endswith("GiB")
    # 10 ranks: the batch of 8 is for 8 of them, of one image each, and the file knows a step on one image.
    assert main.main([*command, "--gpus-per-node", "5", "--step-times", "times.json"]) == 0
    text = capsys.readouterr().out
    assert "4, 8 px: the batch keeps 8, 8 of 10 ranks at work" in text and "minibatch standard deviation" in text
    assert sorted(p.name for p in working_folder.iterdir()) == ["times.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "0"], ("--nodes", "0", "at least 1")),
        (["--gpus-per-node", "-1"], ("--gpus-per-node", "-1")),
        (["--bandwidth", "0"], ("--bandwidth", "0.0", "GB/s")),
        (["--bandwidth-inside", "nan"], ("--bandwidth-inside", "nan")),
        (["--latency", "-1"], ("--latency", "-1.0", "microseconds")),
        (["--measure-seconds", "0"], ("--measure-seconds", "above 0")),
        (["--step-times", "missing.json"], ("--step-times", "missing.json", "--write-step-times")),
        (["--step-times", "broken.json"], ("--step-times", "broken.json", "--write-step-times")),
        (["--step-times", "other.json"], ("--step-times", "other.json", "fmap_max 8", "16")),
        (["--step-times", "schema.json"], ("--step-times", "schema 9")),
        (["--step-times", "empty.json"], ("--step-times", "no timing")),
        (["--write-step-times", "no/folder.json"], ("--write-step-times", "no/folder.json")),
        (["--nodes", "3", "--batch", "32"], ("--batch", "32", "multiple of 24")),
        (["--accumulation", "64", "--batch", "32"], ("--batch", "32", "multiple of")),
    ],
)
def test_plan_refuses(
    working_folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: tuple[str, ...]
) -> None:
    Path("broken.json").write_text('{"schema": 1}')
    good = times_of(SMALL, [(4, 4, False, 1.0)])
    write(good, "other.json")
    write(replace(good, timings=[], recipe=recipe(parse([*SMALL, "--fmap-max", "16"]).config, 1)), "empty.json")
    write(replace(good, schema=9), "schema.json")
    before = sorted(working_folder.iterdir())
    assert main.main(["plan", *SMALL, "--fmap-max", "16", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert sorted(working_folder.iterdir()) == before


def test_plan_without_data_is_of_the_published_recipe(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["--data", "synthetic"]).config
    times = times_of(["--data", "synthetic"], [(4, 1, False, 1.0)])
    write(replace(times, recipe=recipe(config, 3)), "times.json")
    command = ["plan", "--variant", "pggan", "--resolution", "16", "--nodes", "16", "--step-times", "times.json"]
    assert main.main(command) == 0
    text = capsys.readouterr().out
    assert "pggan, paper preset: 12000 kimg to 16 px on 16 x 8 = 128 ranks" in text
    assert "* 8, 16 px: by operations and parameters" in text
