"""Properties of every pipeline: order, ranks, resuming, growing. On prepared sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastgan.data
from fastgan.data import Batch, Pipeline
from fastgan.data.prepared.manifest import Manifest
from fastgan.errors import ArgumentError

COUNT = 13
KINDS = ("cache", "dali", "torch")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, prepared_set: Callable[..., Manifest]) -> dict[str, Path]:
    """For each pipeline a set of 13 images of 16 px that it can read; image i has label i."""
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 16, 16), dtype=np.uint8)
    images = images // 4 + (np.arange(COUNT, dtype=np.uint8) * 14)[:, None, None, None]
    out = {}
    for kind, cache_to in (("cache", 16), ("dali", 4), ("torch", 4)):
        out[kind] = tmp_path_factory.mktemp(kind)
        prepared_set(out[kind], images, np.arange(COUNT), cache_to=cache_to)
    return out


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, sets: dict[str, Path]) -> Callable[..., Pipeline]:
    def make(resolution: int = 16, batch: int | None = 6, **options: Any) -> Pipeline:
        settings = {"seed": 1, "workers": 2, "mirror": True, "target": 16} | options
        return fastgan.data.open(str(sets[request.param]), resolution, batch, pipeline=request.param, **settings)

    return make


def assert_same(one: Batch, other: Batch) -> None:
    assert one.labels is not None and other.labels is not None
    for a, b in ((one.images, other.images), (one.labels, other.labels), (one.positions, other.positions)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def labels_by_position(parts: list[Batch]) -> dict[int, int]:
    """Position -> image; no position comes twice."""
    seen: dict[int, int] = {}
    for part in parts:
        assert part.labels is not None
        for position, label in zip(part.positions.tolist(), part.labels.tolist(), strict=True):
            assert position not in seen
            seen[position] = label
    return seen


def assert_epochs(seen: dict[int, int]) -> list[list[int]]:
    """Positions have no gaps, and every whole epoch holds each image once; the orders."""
    assert sorted(seen) == list(range(len(seen)))
    orders = [[seen[e * COUNT + i] for i in range(COUNT)] for e in range(len(seen) // COUNT)]
    for order in orders:
        assert sorted(order) == list(range(COUNT))
    return orders


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_image_once_per_epoch(opened: Callable[..., Pipeline], world: int) -> None:
    """Batches of 24 over sets of 13: epochs end inside a batch, and the last is left unfinished."""
    parts = []
    for rank in range(world):
        with opened(4, 24, rank=rank, world=world) as pipeline:
            parts += [next(pipeline) for _ in range(3)]
    orders = assert_epochs(labels_by_position(parts))
    assert len(orders) == 5
    assert len({tuple(order) for order in orders}) == 5


def test_images_belong_to_their_labels(opened: Callable[..., Pipeline]) -> None:
    """Image i is about 14 i + 32 bright; JPEG changes that little."""
    with opened() as pipeline:
        for _ in range(3):
            batch = next(pipeline)
            assert batch.labels is not None and batch.images.shape == (6, 3, 16, 16)
            bright = batch.images.mean(dim=(1, 2, 3)).add(1).mul(127.5)
            torch.testing.assert_close(bright, 14.0 * batch.labels + 31.5, rtol=0, atol=3)


def test_order_does_not_depend_on_the_workers(opened: Callable[..., Pipeline]) -> None:
    with opened(workers=1) as one, opened(workers=4) as four:
        for _ in range(5):
            assert_same(next(one), next(four))


def test_order_is_the_same_for_all_pipelines(sets: dict[str, Path]) -> None:
    pipelines = [
        fastgan.data.open(str(sets[kind]), 16, 6, seed=1, mirror=True, pipeline=kind)  # type: ignore[arg-type]
        for kind in KINDS
    ]
    for _ in range(5):
        cache, dali, threads = (next(pipeline) for pipeline in pipelines)
        assert torch.equal(cache.positions, dali.positions) and torch.equal(cache.positions, threads.positions)
        assert torch.equal(cache.labels, dali.labels) and torch.equal(cache.labels, threads.labels)  # type: ignore[arg-type]
    for pipeline in pipelines:
        pipeline.close()


# A run that grows: (resolution, batch) of each of its steps; epochs end at positions 13, 26, 39.
RUN = [(4, 6)] * 3 + [(8, 4)] * 3 + [(16, 4)] * 3


def test_killed_anywhere_and_resumed_is_bit_identical(opened: Callable[..., Pipeline]) -> None:
    states, batches = [], []
    with opened(4) as pipeline:
        for resolution, size in RUN:
            pipeline.set_resolution(resolution, size)
            states.append(pipeline.state_dict())
            batches.append(next(pipeline))
    for killed, state in enumerate(states):
        assert state.keys() == {"position", "seed", "fingerprint"}
        with opened(RUN[killed][0], RUN[killed][1], seed=99) as resumed:
            resumed.load_state_dict(state)
            for (resolution, size), expected in zip(RUN[killed:], batches[killed:], strict=True):
                resumed.set_resolution(resolution, size)
                assert_same(next(resumed), expected)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 8)])
def test_another_world_loses_and_repeats_nothing(opened: Callable[..., Pipeline], before: int, after: int) -> None:
    """Killed in the middle of an epoch."""
    parts, states = [], []
    for rank in range(before):
        with opened(4, 6, rank=rank, world=before) as pipeline:
            parts += [next(pipeline) for _ in range(3)]
            states.append(pipeline.state_dict())
    assert all(state == states[0] for state in states)
    for rank in range(after):
        with opened(4, 24, rank=rank, world=after) as pipeline:
            pipeline.load_state_dict(states[0])
            parts.append(next(pipeline))
    assert len(assert_epochs(labels_by_position(parts))) == 3


def test_batches_given_stay_as_they_were(opened: Callable[..., Pipeline]) -> None:
    """The caller's batch shares no memory with a decoder or the next batch."""
    with opened() as pipeline:
        batches = [next(pipeline) for _ in range(6)]
        copies = [Batch(*(part.clone() for part in batch)) for batch in batches]  # type: ignore[union-attr]
        for _ in range(6):
            next(pipeline)
    for batch, copy in zip(batches, copies, strict=True):
        assert_same(batch, copy)


def test_describe_says_which_and_why(opened: Callable[..., Pipeline], sets: dict[str, Path]) -> None:
    with opened() as pipeline:
        kind = pipeline.kind[0]
        text = pipeline.describe()
    assert text.startswith(f"prepared: 13 images, 3 channels from {sets[kind]}, at 16 px by {kind}: ")
    assert text.endswith("; prepared" if kind == "cache" else "; as requested")


def test_auto_selects_the_cache_if_there_is_one(sets: dict[str, Path]) -> None:
    with fastgan.data.open(str(sets["dali"]), 4, 6, target=16, resident_bytes=0) as pipeline:
        chosen = [pipeline.kind[0]]
        for resolution in (8, 16):
            pipeline.set_resolution(resolution)
            chosen.append(pipeline.kind[0])
            assert "again and again" not in pipeline.describe()  # each size has files of its own
        assert pipeline.describe().endswith("; decoded it takes 9.98 kB, above 0 bytes (--resident-gb)")
    assert chosen == ["cache", "dali", "dali"]
    with fastgan.data.open(str(sets["dali"]), 16, 6) as pipeline:
        assert pipeline.describe().endswith("in memory (9.98 kB); it fits in 1.07 GB")


def test_cache_that_cannot_last_is_refused_at_the_start(sets: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match=r"--pipeline 'cache': at 16 px decoded .* --cache-to 16"):
        fastgan.data.open(str(sets["dali"]), 4, pipeline="cache", target=16, resident_bytes=0)


def test_dali_without_image_files_is_refused(sets: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match=r"must be auto or torch, got 'dali'; .* has no image files to decode"):
        fastgan.data.open(str(sets["cache"]), 4, pipeline="dali", target=16)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch": 7, "world": 2}, "--batch"),
        ({"batch": 0}, "--batch"),
        ({"pipeline": "fast"}, "--pipeline"),
        ({"resolution": 32, "target": None}, "--resolution"),
        ({"resolution": 16, "target": 8}, "--resolution"),
    ],
)
def test_open_refuses(sets: dict[str, Path], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError) as error:
        fastgan.data.open(str(sets["cache"]), **({"resolution": 4, "batch": 6, "target": 16} | options))
    assert error.value.argument == named


def test_iterating_needs_a_batch(sets: dict[str, Path]) -> None:
    with fastgan.data.open(str(sets["cache"]), 16) as pipeline, pytest.raises(ArgumentError, match="batch"):
        next(iter(pipeline))
    with (
        fastgan.data.open(str(sets["cache"]), 16, 6, world=2) as pipeline,
        pytest.raises(ArgumentError, match="--batch"),
    ):
        pipeline.set_resolution(8, 5)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("cache/0004/00001.npy", "cache/0004/00001.npy"),
        ("encoded/0008/00000.tar", "encoded/0008/00000.tar"),
        ("encoded/0016/offsets.npy", "encoded/0016/offsets.npy"),
        ("labels.npy", "labels.npy"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "truncated", "too long"])
def test_damaged_sets_are_refused_at_open(
    tmp_path: Path, prepared_set: Callable[..., Manifest], file: str, words: str, how: str
) -> None:
    """Whatever resolution is opened first: a run must not stop when it grows."""
    images = np.zeros((7, 3, 16, 16), dtype=np.uint8)
    prepared_set(tmp_path / "set", images, np.arange(7), cache_to=4)
    damaged = tmp_path / "set" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if how != "missing":
        damaged.write_bytes(content[:-7] if how == "truncated" else content + b"more")
    with pytest.raises(ArgumentError) as error:
        fastgan.data.open(str(tmp_path / "set"), 4, 2, target=16)
    assert words in str(error.value) and str(tmp_path / "set") in str(error.value)
    assert how in str(error.value)
