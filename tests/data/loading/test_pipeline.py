from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastgan.data
from fastgan.data import Batch, Pipeline, Source, fade, open_source
from fastgan.data.loading.pipeline import mirrored
from fastgan.errors import ArgumentError

COUNT = 13


class Counting(Source):
    """Thirteen small pictures with labels that counts its reads and can fail on one of them."""

    def __init__(self, resolution: int = 16, fingerprint: str = "c0") -> None:
        labels = np.arange(COUNT, dtype=np.int64) % 3
        super().__init__(
            "counting",
            resolution=resolution,
            channels=2,
            labels=labels,
            num_classes=3,
            fingerprint=fingerprint,
        )
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (COUNT, 2, resolution, resolution), dtype=np.uint8)
        self.images[0] = 0
        self.images[1] = 255
        self.reads: list[int] = []
        self.broken: int | None = None

    def __len__(self) -> int:
        return COUNT

    def _target(self, index: int) -> np.ndarray:
        self.reads.append(index)
        if index == self.broken:
            raise ArgumentError("--data", index, "broken")
        return self.images[index]


def streamed(source: Source | None = None, **options: Any) -> Pipeline:
    return opened(source, **(options | {"resident_bytes": 0}))


def opened(source: Source | None = None, **options: Any) -> Pipeline:
    settings: dict[str, Any] = {"resolution": 16, "seed": 1, "workers": 2} | options
    return fastgan.data.open(source or Counting(), **settings)


def assert_same(one: Batch, other: Batch) -> None:
    assert one.labels is not None and other.labels is not None
    for a, b in ((one.images, other.images), (one.labels, other.labels), (one.positions, other.positions)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_read_once(source: Counting, needed: int, ahead: int) -> None:
    """The first `needed` positions were read, none twice; closing may cancel those up to `ahead`."""
    indices = fastgan.data.Sampler(COUNT, seed=1).indices(range(ahead)).tolist()
    assert Counter(indices[:needed]) <= Counter(source.reads) <= Counter(indices)


def test_batch_has_the_requested_images() -> None:
    source = Counting()
    with opened(source) as pipeline:
        batch = pipeline.batch(3, 8)
    indices = fastgan.data.Sampler(COUNT, seed=1).indices(range(3, 11))
    assert (batch.images.dtype, batch.images.shape) == (torch.float32, (8, 2, 16, 16))
    expected = source.images[indices].astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(batch.images, expected)
    assert batch.labels is not None and batch.labels.dtype == batch.positions.dtype == torch.int64
    np.testing.assert_array_equal(batch.labels, source.labels[indices])  # type: ignore[index]
    np.testing.assert_array_equal(batch.positions, np.arange(3, 11))


def test_values_fill_the_range() -> None:
    images = opened().batch(0, COUNT).images
    assert images.min() == -1 and images.max() == 1


@pytest.mark.parametrize("resolution", [4, 8, 16])
@pytest.mark.parametrize("mirror", [False, True])
def test_resident_and_streamed_are_identical(resolution: int, mirror: bool) -> None:
    """Over two epochs' ends; the resident set shrinks one stack, the stream each image."""
    with (
        opened(resolution=resolution, mirror=mirror) as resident,
        streamed(resolution=resolution, mirror=mirror) as stream,
    ):
        assert "in memory" in resident.describe() and "threads" in stream.describe()
        for start in range(0, 3 * COUNT, 6):
            assert_same(resident.batch(start, 6), stream.batch(start, 6))


def test_resident_at_low_resolution_only_is_identical() -> None:
    """The target set does not fit, this one does: it is decoded at its own size."""
    source = Counting()
    with opened(source, resolution=4, resident_bytes=COUNT * 2 * 16) as low, streamed(resolution=4) as stream:
        assert "in memory" in low.describe()
        assert len(source.reads) == COUNT
        assert_same(low.batch(0, 26), stream.batch(0, 26))
        low.set_resolution(8)
        assert "threads" in low.describe()


@pytest.mark.parametrize("make", [opened, streamed])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch(make: Callable[..., Pipeline], world: int) -> None:
    whole = make(mirror=True).batch(10, 8)
    assert whole.labels is not None
    single = make(mirror=True)
    for rank in range(world):
        share = Batch(whole.images[rank::world], whole.labels[rank::world], whole.positions[rank::world])
        with make(mirror=True, rank=rank, world=world) as pipeline:
            assert_same(pipeline.batch(10, 8), share)
        assert_same(single.batch(10, 8, rank=rank, world=world), share)


@pytest.mark.parametrize("make", [opened, streamed])
def test_jumping_and_changing_size(make: Callable[..., Pipeline]) -> None:
    pipeline = make(mirror=True)
    for start, size in ((0, 4), (4, 4), (100, 4), (0, 4), (4, 6), (4, 6), (10, 1)):
        assert_same(pipeline.batch(start, size), opened(mirror=True).batch(start, size))


def test_stream_reads_ahead_and_nothing_twice() -> None:
    source = Counting()
    with streamed(source) as pipeline:
        pipeline.batch(0, 4)
        pipeline.batch(4, 4)
        pipeline.batch(8, 4)
    assert_read_once(source, needed=12, ahead=16)


def test_virtual_ranks_read_nothing_twice() -> None:
    source = Counting()
    with streamed(source) as pipeline:
        for start in (0, 6):
            for rank in range(3):
                pipeline.batch(start, 6, rank=rank, world=3)
        assert set(pipeline._store._prefetcher.pending) == {(12, 6, rank, 3) for rank in range(3)}  # type: ignore[attr-defined]
    assert_read_once(source, needed=12, ahead=18)


def test_stream_keeps_no_stale_batches() -> None:
    with streamed() as pipeline:
        for start in (0, 1000, 50, 7, 2000):
            pipeline.batch(start, 4)
        assert list(pipeline._store._prefetcher.pending) == [(2004, 4, 0, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [opened, streamed])
def test_set_resolution(make: Callable[..., Pipeline]) -> None:
    pipeline = make(resolution=4)
    for resolution in (8, 16, 4):
        pipeline.batch(0, 4)
        pipeline.set_resolution(resolution)
        assert pipeline.resolution == resolution
        assert_same(pipeline.batch(4, 4), make(resolution=resolution).batch(4, 4))
    with pytest.raises(ArgumentError, match="--resolution"):
        pipeline.set_resolution(32)
    assert_same(pipeline.batch(4, 4), opened(resolution=4).batch(4, 4))


def test_growing_in_memory_decodes_once() -> None:
    source = Counting()
    with opened(source, resolution=4) as pipeline:
        for resolution in (8, 16):
            pipeline.set_resolution(resolution)
    assert sorted(source.reads) == list(range(COUNT))


def test_flips_depend_on_seed_and_position_only() -> None:
    positions = np.arange(4096)
    flips = mirrored(3, positions)
    assert set(flips) == {0, 1}
    assert abs(flips.mean() - 0.5) < 0.03
    assert abs((flips[1:] == flips[:-1]).mean() - 0.5) < 0.03
    np.testing.assert_array_equal(mirrored(3, positions[::-7]), flips[::-7])
    for seed in (4, -3, 2**64 - 1):
        assert abs((mirrored(seed, positions) == flips).mean() - 0.5) < 0.03
    # A stored run must find its flips again.
    np.testing.assert_array_equal(flips[:16], [1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1])


def test_mirror_flips_left_to_right() -> None:
    plain, mirror = opened().batch(0, 26).images, opened(mirror=True).batch(0, 26).images
    flips = mirrored(1, np.arange(26))
    for i, flip in enumerate(flips):
        torch.testing.assert_close(mirror[i], plain[i].flip(2) if flip else plain[i], rtol=0, atol=0)


def test_unlabeled_folder(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((16, 16), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    source = open_source(f"folder:{tmp_path}", 8)
    with fastgan.data.open(source, resolution=8, seed=0, resident_bytes=0, workers=2) as pipeline:
        batch = pipeline.batch(0, 3)
        assert f"folder: 3 images, 1 channel from {tmp_path}, at 8 px by dali: decoded on the CPU by 2 threads; " in (
            pipeline.describe()
        )
    assert batch.labels is None
    assert sorted(batch.images[:, 0, 0, 0].tolist()) == pytest.approx([-1, 80 / 127.5 - 1, 160 / 127.5 - 1])


def test_describe_digits() -> None:
    with fastgan.data.open(open_source("digits", 16), resolution=16, seed=0) as pipeline:
        expected = "digits: 1,797 images, 1 channel, at 16 px by cache: in memory (460 kB); it fits in 1.07 GB"
        assert pipeline.describe() == expected


@pytest.mark.parametrize("make", [opened, streamed])
def test_state(make: Callable[..., Pipeline]) -> None:
    stored = make(seed=9, mirror=True)
    stored.batch(0, 4)
    state = stored.state_dict()
    assert state == {"position": 4, "seed": 9, "fingerprint": "c0"}
    resumed = make(seed=1, mirror=True)
    resumed.batch(0, 4)
    resumed.load_state_dict(state)
    assert (resumed.seed, resumed.position) == (9, 4)
    assert_same(resumed.batch(4, 4), stored.batch(4, 4))


def test_state_of_other_data_is_refused() -> None:
    state = opened().state_dict()
    with pytest.raises(ArgumentError, match="--data"):
        opened(Counting(fingerprint="c1")).load_state_dict(state)
    with pytest.raises(ArgumentError, match="state"):
        opened().load_state_dict({"seed": 1})


def test_broken_image_raises() -> None:
    source = Counting()
    source.broken = 5
    with pytest.raises(ArgumentError, match="broken"):
        opened(source)
    with streamed(source) as pipeline, pytest.raises(ArgumentError, match="broken"):
        pipeline.batch(0, COUNT)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"resolution": 32}, "--resolution"),
        ({"resolution": 6}, "--resolution"),
        ({"workers": -1}, "--workers"),
        ({"rank": 2, "world": 2}, "rank"),
        ({"world": 0}, "world"),
        ({"resident_bytes": -1}, "resident_bytes"),
    ],
)
def test_open_refuses(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError) as error:
        opened(**options)
    assert error.value.argument == named


def test_batch_must_divide() -> None:
    with pytest.raises(ArgumentError, match="--batch"):
        opened(world=3).batch(0, 8)


def test_fade() -> None:
    images = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fade(images, torch.tensor(1.0)), images, rtol=0, atol=0)
    coarse = fade(images, torch.tensor(0.0))
    blocks = images.reshape(3, 2, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(coarse, blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(fade(images, torch.tensor(0.25)), 0.75 * coarse + 0.25 * images)
    assert fade(images.half(), torch.tensor(0.5)).dtype == torch.float16


def test_fade_reads_nothing_back() -> None:
    """On the meta device there are no values, so a read on the host raises."""
    alpha = torch.tensor(0.5, device="meta")
    assert fade(torch.empty(2, 1, 8, 8, device="meta"), alpha).shape == (2, 1, 8, 8)
