"""Time to open a prepared set of a million images.

    pytest benchmarks/data/bench_manifest.py --benchmark-only

Its files have the right sizes and no content, which opening does not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgan.data import open_source
from fastgan.data.preparation.shards import npy_header
from fastgan.data.prepared.manifest import (
    LABELS,
    NAMES,
    SKIPPED,
    Manifest,
    Shard,
    cache_file,
    fingerprint,
    index_file,
    offsets_file,
    read_manifest,
    tar_file,
    write_manifest,
)
from fastgan.utils.files import FileRecord

COUNT, PER_SHARD = 1_000_000, 1024


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1024 px in color, labeled: 977 shards of 9 resolutions, 11,729 files."""
    folder = tmp_path_factory.mktemp("million")
    resolutions = tuple(2**i for i in range(2, 11))
    cached = tuple(r for r in resolutions if r <= 128)
    shards = [Shard(first, min(PER_SHARD, COUNT - first)) for first in range(0, COUNT, PER_SHARD)]
    files: dict[str, FileRecord] = {}

    def add(name: str, size: int, head: bytes = b"") -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as stream:
            stream.write(head)
            stream.truncate(len(head) + size)
        files[name] = FileRecord(len(head) + size, f"{len(files):064x}")

    for r in resolutions:
        for number, shard in enumerate(shards):
            if r in cached:
                shape = (shard.count, 3, r, r)
                add(cache_file(r, number), int(np.prod(shape)), npy_header("|u1", shape))
            else:
                add(tar_file(r, number), shard.count * r * r // 2)
                add(index_file(r, number), shard.count * 70)
        if r not in cached:
            add(offsets_file(r), COUNT * 16, npy_header("<i8", (COUNT, 2)))
    add(LABELS, COUNT * 8, npy_header("<i8", (COUNT,)))
    add(NAMES, COUNT * 40)
    add(SKIPPED, 0)
    write_manifest(
        Manifest(
            path=folder,
            version="0",
            count=COUNT,
            channels=3,
            resolution=1024,
            resolutions=resolutions,
            cached=cached,
            encoding="jpeg",
            num_classes=10,
            fingerprint=fingerprint(files, {}),
            settings={},
            source={"kind": "folder", "name": "million", "digest": ""},
            skipped=0,
            shards=tuple(shards),
            files=files,
        )
    )
    return folder


def test_manifest(benchmark: Any, million: Path) -> None:
    """`read_manifest` alone."""
    manifest = benchmark(read_manifest, million)
    assert manifest.count == COUNT


def test_open_source(benchmark: Any, million: Path) -> None:
    """What a run reads: the manifest, the size of each file, the labels."""
    source = benchmark.pedantic(open_source, (str(million), 1024), rounds=5)
    assert len(source) == COUNT
