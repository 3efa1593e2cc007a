"""The last step of a preparation: number the images without gaps, write the tables over all shards and the manifest."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np

from fastgan.data.preparation.context import Context
from fastgan.data.preparation.jobs import renumber_shard
from fastgan.data.preparation.output import OutputFormat
from fastgan.data.preparation.settings import versions
from fastgan.data.preparation.shards import npy_header, read_index
from fastgan.data.prepared.manifest import (
    CLASSES,
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
from fastgan.errors import ArgumentError, printable
from fastgan.utils.files import AtomicFile, FileRecord, write_atomic


def assemble(context: Context, output: OutputFormat, shards: int) -> Manifest:
    """Finish a set whose shards are all written: renumber, write tables and manifest, remove the state."""
    state = context.state
    placed, moved = _place_shards(context, output, shards)
    with context.bar("renumbering", len(moved), "shards") as bar:
        jobs = ((shard, placed[shard].first, output) for shard in moved)
        for _ in context.pool.run(renumber_shard, jobs, lambda count: None):
            bar.update()
    files, skipped = _write_tables(context, output, placed)
    listed = state.note("listed.json")
    assert listed is not None
    settings, collection = asdict(context.settings), context.collection
    manifest = Manifest(
        path=state.dst,
        version=versions()["fastgan"],
        count=sum(shard.count for shard in placed),
        channels=output.channels,
        resolution=output.resolutions[-1],
        resolutions=output.resolutions,
        cached=output.cached,
        encoding=output.encoding,
        num_classes=output.num_classes,
        fingerprint=fingerprint(files, settings),
        settings=settings,
        source={"kind": collection.kind, "name": collection.name, "digest": listed["digest"]},
        skipped=skipped,
        shards=tuple(placed),
        files=files,
    )
    write_manifest(manifest)
    state.remove()
    return manifest


def _place_shards(context: Context, output: OutputFormat, shards: int) -> tuple[list[Shard], list[int]]:
    """Return where each shard starts, and the shards whose files have other numbers.

    Raises:
        ArgumentError: no image could be decoded, or with `strict` one could not.
    """
    collection, state = context.collection, context.state
    placed, moved, first, late = [], [], 0, 0
    for shard in range(shards):
        finished = state.finished(shard)
        placed.append(Shard(first, finished.count))
        if finished.first != first and output.encoded:
            moved.append(shard)
        first += finished.count
        late += len(finished.late)
    if late and context.strict:
        problem = f"--strict: {late:,} of its files cannot be decoded; without --strict they are skipped"
        raise ArgumentError("SRC", collection.title, problem)
    if not first:
        state.remove(everything=True)
        raise ArgumentError("SRC", collection.title, "none of its images can be decoded")
    return placed, moved


def _write_tables(context: Context, output: OutputFormat, shards: list[Shard]) -> tuple[dict[str, FileRecord], int]:
    """Write names, labels, offsets and skipped files; return all files of the set, and the number of skipped ones."""
    state = context.state
    total = sum(shard.count for shard in shards)
    headers: dict[str, bytes] = {NAMES: b"", SKIPPED: b""}
    headers |= {offsets_file(r): npy_header("<i8", (total, 2)) for r in output.encoded}
    if output.num_classes:
        headers[LABELS] = npy_header("<i8", (total,))
    files: dict[str, FileRecord] = {}
    skipped = 0
    with ExitStack() as stack:
        tables = {name: stack.enter_context(AtomicFile(state.dst / name)) for name in headers}
        for name, table in tables.items():
            table.write(headers[name])
        for shard in range(len(shards)):
            finished = state.finished(shard)
            files |= finished.files
            images = state.images(shard)
            rejected = output.rejections(state.inspections(shard)) | finished.late
            skipped += len(rejected)
            for at, problem in sorted(rejected.items()):
                tables[SKIPPED].write(f"{printable(images[at].name)}\t{printable(problem)}\n".encode())
            used = [image for at, image in enumerate(images) if at not in rejected]
            tables[NAMES].write("".join(json.dumps(image.name) + "\n" for image in used).encode())
            if output.num_classes:
                tables[LABELS].write(np.array([output.label(image) for image in used], "<i8").tobytes())
            for r in output.encoded:
                offsets = read_index((state.dst / index_file(r, shard)).read_bytes())
                tables[offsets_file(r)].write(offsets.astype("<i8").tobytes())
        files |= {name: table.commit() for name, table in tables.items()}
    classes = sorted(output.ranks, key=output.ranks.__getitem__) if output.ranks else context.collection.classes
    if output.num_classes and classes:
        files[CLASSES] = write_atomic(state.dst / CLASSES, json.dumps(classes, indent=1).encode())
    return files, skipped
