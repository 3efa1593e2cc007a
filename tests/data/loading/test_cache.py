from __future__ import annotations

import gc
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan import data
from fastgan.data import open_source
from fastgan.data.loading import cache
from fastgan.data.loading.cache import MappedStore, ResidentStore, upload_all
from fastgan.data.loading.gather import RowGatherer
from fastgan.data.loading.image_store import BatchRequest
from fastgan.data.prepared.manifest import Manifest, tar_file
from fastgan.errors import ArgumentError


def shards(*counts: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8) for count in counts]


@pytest.mark.parametrize("counts", [(7,), (3, 4, 1), (0, 5, 0, 2, 0)])
def test_mapped_and_resident_gather_by_index(counts: tuple[int, ...]) -> None:
    """Over shards of any size, empty ones too, in any order, with repeats."""
    arrays = shards(*counts)
    whole = np.concatenate(arrays)
    indices = np.array([5, 0, 6, 6, 3, 2, 1], dtype=np.int64)
    on_device = torch.from_numpy(indices)
    device = torch.device("cpu")
    with ThreadPoolExecutor(1) as pool:
        mapped = MappedStore(arrays, lambda call: np.arange(call.size), pool, device)
        call = BatchRequest(0, 7, 0, 1)
        for store in (mapped, ResidentStore(torch.from_numpy(whole)), ResidentStore(upload_all(arrays, device))):
            np.testing.assert_array_equal(store.take(call, indices, on_device), whole[indices])
        # The next batch was prefetched in the order of the run; the requested indices do not matter.
        np.testing.assert_array_equal(mapped.take(BatchRequest(7, 7, 0, 1), indices, on_device), whole[:7])


def test_batches_in_memory_are_gathered_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """After enough of them in a row; after the first that waits for the disk, the other thread gathers again."""
    arrays = shards(30, 34)
    whole = np.concatenate(arrays)
    waits = {threading.get_ident(): 0}
    gathered_by: list[str] = []

    def counted() -> int:
        gathered_by.append(threading.current_thread().name)
        return waits.setdefault(threading.get_ident(), 0)

    def check(start: int) -> None:
        indices = np.arange(start, start + 4) % 64
        taken = mapped.take(BatchRequest(start, 4, 0, 1), indices, torch.from_numpy(indices))
        np.testing.assert_array_equal(taken, whole[indices])

    monkeypatch.setattr(cache, "_major_faults", counted)
    monkeypatch.setattr(cache, "_BATCHES_IN_MEMORY", 3)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        mapped = MappedStore(arrays, lambda call: np.arange(call.start, call.start + 4) % 64, pool, torch.device("cpu"))
        for step in range(3):
            check(4 * step)
        assert {name[:5] for name in gathered_by} == {"ahead"}
        pool.submit(lambda: None).result()  # the fourth batch was started there and may still be running
        for step in range(3, 40):
            check(4 * step)
            assert gathered_by[-2:] == [threading.current_thread().name] * 2
            assert not mapped._prefetcher.pending  # no unused batch stays in memory
        rows = mapped._rows
        monkeypatch.setattr(mapped, "_rows", Waiting(rows, waits))
        check(160)
        monkeypatch.setattr(mapped, "_rows", rows)
        del gathered_by[:]
        for step in range(41, 44):
            check(4 * step)
        assert {name[:5] for name in gathered_by} == {"ahead"}
        monkeypatch.setattr(cache, "_SMALL_BATCH", 4 * 3 * 4 * 4 - 1)
        check(176)
        assert gathered_by[-1].startswith("ahead")
        # Where the system does not count major faults, the other thread keeps gathering.
        monkeypatch.setattr(cache, "_SMALL_BATCH", 2**20)
        monkeypatch.setattr(cache, "_major_faults", lambda: None)
        for step in range(45, 52):
            check(4 * step)
        assert mapped._without_disk == 0


class Waiting:
    """A gatherer that waits for the disk in every batch."""

    def __init__(self, rows: RowGatherer, waits: dict[int, int]) -> None:
        self._rows, self._waits, self.bytes_per_row = rows, waits, rows.bytes_per_row

    def take(self, indices: np.ndarray) -> torch.Tensor:
        self._waits[threading.get_ident()] += 1
        return self._rows.take(indices)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say")
def test_major_faults_count_pages_that_are_not_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.npy"
    np.save(file, np.ones((64, 3, 64, 64), dtype=np.uint8))
    array = np.load(file, mmap_mode="r")
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = cache._major_faults()
    assert before is not None
    assert array.sum() == array.size
    first = cache._major_faults()
    assert array.sum() == array.size
    assert cache._major_faults() == first
    if file_system(tmp_path) != "tmpfs":  # whose files are memory
        assert first is not None and first > before


def file_system(path: Path) -> str:
    """The type of the one that `path` is on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    on = [mount for mount in mounts if path.resolve().is_relative_to(mount[1])]
    return max(on, key=lambda mount: len(mount[1]))[2]


def test_prepared_shards_are_mapped_not_read(tmp_path: Path, prepared_set: Callable[..., Manifest]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (13, 3, 16, 16), dtype=np.uint8)
    prepared_set(tmp_path, images, cache_to=16)
    arrays = open_source(str(tmp_path), 16).arrays(16)
    assert arrays is not None
    assert [len(one) for one in arrays] == [5, 4, 4]
    np.testing.assert_array_equal(np.concatenate(arrays), images)
    assert not any(one.flags.writeable or one.flags.owndata for one in arrays)
    # A map shows what another process writes.
    with next((tmp_path / "cache" / "0016").glob("00000.npy")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([255 - images[4, -1, -1, -1]]))
    assert arrays[0][-1, -1, -1, -1] == 255 - images[4, -1, -1, -1]


def test_shards_keep_no_descriptors(tmp_path: Path, prepared_set: Callable[..., Manifest]) -> None:
    """A set of a million images has a thousand shards at each resolution; most systems allow 1,024 open files."""
    prepared_set(tmp_path, np.zeros((40, 1, 16, 16), np.uint8), cache_to=16, per_shard=1)
    before = len(os.listdir("/dev/fd"))
    with data.open(tmp_path, resolution=4, target=16, resident_bytes=0) as pipeline:
        for resolution in (4, 8, 16):
            pipeline.set_resolution(resolution)
            pipeline.batch(0, 40)
            assert len(os.listdir("/dev/fd")) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="the system lists its maps in another way")
def test_levels_that_are_left_keep_no_maps(tmp_path: Path, prepared_set: Callable[..., Manifest]) -> None:
    prepared_set(tmp_path, np.zeros((13, 1, 16, 16), np.uint8), cache_to=16)
    source = open_source(str(tmp_path), 16)
    for resolution in (4, 8, 16):
        assert source.arrays(resolution) is not None
        gc.collect()
        assert set(re.findall(rf"{tmp_path}/cache/(\d+)/", Path("/proc/self/maps").read_text())) == {f"{resolution:04}"}


def test_prepared_source(tmp_path: Path, prepared_set: Callable[..., Manifest]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (13, 1, 16, 16), dtype=np.uint8)
    manifest = prepared_set(tmp_path, images, np.arange(13) % 3, cache_to=8, encoding="png")
    for spec in (str(tmp_path), f"prepared:{tmp_path}"):
        source = open_source(spec, 16)
        assert (len(source), source.channels, source.num_classes) == (13, 1, 3)
        assert source.fingerprint == manifest.fingerprint
        np.testing.assert_array_equal(source.labels, np.arange(13) % 3)
        for resolution in (4, 8, 16):
            read = np.stack([source.read(i, resolution) for i in range(13)])
            blocks = images.reshape(13, 1, resolution, 16 // resolution, resolution, 16 // resolution)
            np.testing.assert_allclose(read, blocks.mean(axis=(3, 5)), atol=0.5)
    assert open_source(str(tmp_path), 8).resolution == 8
    for words, settings in (("--resolution", {"resolution": 32}), ("--channels", {"resolution": 16, "channels": 3})):
        with pytest.raises(ArgumentError, match=words):
            open_source(str(tmp_path), **settings)  # type: ignore[arg-type]


def test_a_folder_without_manifest_is_one_of_images(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"must be a folder of images, .* is empty"):
        open_source(str(tmp_path), 16)
    with pytest.raises(ArgumentError, match=r"manifest\.json is missing"):
        open_source(f"prepared:{tmp_path}", 16)


def test_a_cache_file_of_another_shape_is_named(tmp_path: Path, prepared_set: Callable[..., Manifest]) -> None:
    """The size is right, so only its header tells."""
    prepared_set(tmp_path, np.zeros((7, 3, 8, 8), dtype=np.uint8), cache_to=8)
    file = tmp_path / "cache" / "0008" / "00000.npy"
    np.save(file, np.zeros((5, 3, 64), dtype=np.uint8))
    with pytest.raises(ArgumentError, match=r"cache/0008/00000\.npy holds uint8 \[5, 3, 64\]"):
        open_source(str(tmp_path), 8).arrays(8)


@pytest.mark.parametrize("encoding", ["jpeg", "png", "webp"])
def test_damaged_bytes_in_a_tar_are_named(tmp_path: Path, prepared_set: Callable[..., Manifest], encoding: str) -> None:
    prepared_set(tmp_path, np.zeros((7, 3, 8, 8), dtype=np.uint8), cache_to=4, encoding=encoding)
    file = tmp_path / tar_file(8, 1)
    file.write_bytes(bytes(file.stat().st_size))
    source = open_source(str(tmp_path), 8)
    source.read(0, 8)
    with pytest.raises(ArgumentError, match=r"encoded/0008/00001\.tar, member 000000005"):
        source.read(5, 8)
