"""What a worker process does to one shard: inspect its images, then write its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fastgan.data.faults import raise_if_machine
from fastgan.data.images import first_line, is_gray, pyramid
from fastgan.data.preparation.collection import InputCollection, InputImage
from fastgan.data.preparation.output import OutputFormat
from fastgan.data.preparation.shards import ShardWriter, encode, renumber
from fastgan.data.preparation.state import FinishedShard, PreparationState
from fastgan.data.preparation.workers import shared, tick
from fastgan.data.prepared.manifest import SUFFIXES
from fastgan.errors import ArgumentError
from fastgan.utils.files import FileRecord


def inspect_shard(shard: int) -> None:
    """Inspect each image of a shard and store the results."""
    collection, state = _shared()
    rows: list[tuple[Any, ...]] = []
    for image in state.images(shard):
        if image.problem:
            rows.append((image.problem, 0, 0, True))
        else:
            info = collection.inspect(image)
            rows.append((info.problem, *info.size, is_gray(info.mode)))
        tick()
    state.write("looked", shard, rows)


def sample_sizes(shard: int, count: int, output: OutputFormat) -> list[int]:
    """Return the bytes that up to `count` images of a shard take in tars, all encoded resolutions together."""
    collection, state = _shared()
    images, rejected = state.images(shard), output.rejections(state.inspections(shard))
    used = [image for at, image in enumerate(images) if at not in rejected]
    sizes = []
    for image in used[:: max(1, len(used) // count)][:count]:
        pixels, _ = _decode(collection, image, output)
        if pixels is not None:
            levels = pyramid(pixels, output.encoded).values()
            files = [encode(level, output) for level in levels]
            # A tar has a header of 512 bytes before each member and pads it to a multiple of 512; also for the label.
            sizes.append(sum(len(one) + 512 + -len(one) % 512 + 1024 * bool(output.num_classes) for one in files))
        tick()
    return sizes


def encode_shard(shard: int, first: int, output: OutputFormat) -> None:
    """Write all files of a shard, whose images start at global index `first`, and record that it is finished."""
    _, state = _shared()
    images, rejected = state.images(shard), output.rejections(state.inspections(shard))
    used = [at for at in range(len(images)) if at not in rejected]
    late: dict[int, str] = {}
    files = _write(shard, first, used, images, late, output, tick)
    if late:
        # The files had room for images that turned out to be damaged: write them again without these.
        used = [at for at in used if at not in late]
        files = _write(shard, first, used, images, {}, output, lambda count: None)
    state.write_finished(shard, FinishedShard(first, len(used), late, files))


def renumber_shard(shard: int, first: int, output: OutputFormat) -> None:
    """Change the global index at which the images of a finished shard start."""
    _, state = _shared()
    finished = state.finished(shard)
    files = dict(finished.files)
    for r in output.encoded:
        files |= renumber(state.dst, shard, r, first, SUFFIXES[output.encoding])
    state.write_finished(shard, replace(finished, first=first, files=files))


def _write(
    shard: int,
    first: int,
    used: list[int],
    images: list[InputImage],
    late: dict[int, str],
    output: OutputFormat,
    on_image: Callable[[int], object],
) -> dict[str, FileRecord]:
    """Write the files of a shard with the images `used`; no files, and problems in `late`, if some are damaged."""
    collection, state = _shared()
    with ShardWriter(state.dst, shard, first, len(used), output) as writer:
        for at in used:
            pixels, problem = _decode(collection, images[at], output)
            if pixels is None:
                late[at] = problem
            elif not late:
                writer.add(pixels, output.label(images[at]))
            on_image(1)
        return {} if late else writer.commit()


def _decode(collection: InputCollection, image: InputImage, output: OutputFormat) -> tuple[np.ndarray | None, str]:
    """The pixels at the target resolution, or None and the problem."""
    try:
        return collection.pixels(image, output.resolutions[-1], output.channels, output.fit), ""
    except ArgumentError:
        raise  # a prepared set is damaged, or the machine cannot read it
    except Exception as error:  # Pillow's decoders raise nearly any exception on a damaged file
        raise_if_machine(error, "SRC", image.name)
        return None, first_line(error)


def _shared() -> tuple[InputCollection, PreparationState]:
    collection, dst = shared()
    return collection, PreparationState(dst)
