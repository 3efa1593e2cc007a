from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastgan.data.preparation.output import OutputFormat
from fastgan.data.preparation.shards import ShardWriter, read_index
from fastgan.data.prepared.manifest import (
    LABELS,
    NAMES,
    SKIPPED,
    Manifest,
    Shard,
    fingerprint,
    index_file,
    offsets_file,
    write_manifest,
)
from fastgan.utils.files import FileRecord, write_atomic


def write_array(file: Path, array: np.ndarray) -> FileRecord:
    stream = io.BytesIO()
    np.save(stream, array)
    return write_atomic(file, stream.getvalue())


def write_set(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    cache_to: int = 8,
    encoding: str = "jpeg",
    per_shard: int = 5,
) -> Manifest:
    """A prepared set of `images` (uint8 [N, C, R, R]) without the command; the second shard has one image fewer."""
    resolution = images.shape[-1]
    resolutions = tuple(2**i for i in range(2, resolution.bit_length()))
    cached = tuple(r for r in resolutions if r <= cache_to)
    ends = [*range(per_shard, len(images), per_shard), len(images)]
    if len(ends) > 2:
        ends[1] -= 1
    shards, files = [], {}
    output = OutputFormat(resolutions, cached, images.shape[1], encoding)
    offsets: dict[int, list[np.ndarray]] = {r: [] for r in resolutions if r not in cached}
    for number, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        shards.append(Shard(first, end - first))
        with ShardWriter(folder, number, first, end - first, output) as writer:
            for i in range(first, end):
                writer.add(images[i], None if labels is None else int(labels[i]))
            files |= writer.commit()
        for r, parts in offsets.items():
            parts.append(read_index((folder / index_file(r, number)).read_bytes()))
    for r, parts in offsets.items():
        files[offsets_file(r)] = write_array(folder / offsets_file(r), np.concatenate(parts))
    if labels is not None:
        files[LABELS] = write_array(folder / LABELS, labels.astype(np.int64))
    names = "".join(json.dumps(f"image {i}") + "\n" for i in range(len(images)))
    files[NAMES] = write_atomic(folder / NAMES, names.encode())
    files[SKIPPED] = write_atomic(folder / SKIPPED, b"")
    manifest = Manifest(
        path=folder,
        version="0",
        count=len(images),
        channels=images.shape[1],
        resolution=resolution,
        resolutions=resolutions,
        cached=cached,
        encoding=encoding,
        num_classes=0 if labels is None else int(labels.max()) + 1,
        fingerprint=fingerprint(files, {}),
        settings={},
        source={"kind": "folder", "name": "images"},
        skipped=0,
        shards=tuple(shards),
        files=files,
    )
    write_manifest(manifest)
    return manifest


@pytest.fixture(scope="session")
def prepared_set() -> Callable[..., Manifest]:
    """`write_set`."""
    return write_set
