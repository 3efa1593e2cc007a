"""What the worker processes of `fastgan prepare` do to one shard: look at its originals, then write its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.images import first_line, is_gray, pyramid
from fastgan.data.preparation.originals import Item, Originals, gone
from fastgan.data.preparation.shards import ShardWriter, encode, renumber
from fastgan.data.preparation.unfinished import Unfinished
from fastgan.data.preparation.workers import shared, tick
from fastgan.data.prepared import SUFFIXES
from fastgan.utils.files import File


@dataclass(frozen=True)
class Plan:
    """What is written, once all originals were looked at.

    resolutions: from 4 to the target; cached: those of them that are stored as arrays. min_size: px, of the shorter
    side, of the longer one with `fit`. num_classes: 0 without labels. ranks: labels of the classes that have names.
    """

    resolutions: tuple[int, ...]
    cached: tuple[int, ...]
    channels: int
    encoding: str
    quality: int
    fit: bool
    min_size: int
    num_classes: int
    ranks: dict[str, int]

    def label(self, item: Item) -> int | None:
        if not self.num_classes or item.label is None:
            return None
        return self.ranks[item.label] if isinstance(item.label, str) else item.label

    @property
    def encoded(self) -> tuple[int, ...]:
        return self.resolutions[len(self.cached) :]

    def extent(self, width: int, height: int) -> int:
        """The side that has to reach the target resolution."""
        return max(width, height) if self.fit else min(width, height)


@dataclass(frozen=True)
class Looked:
    """What looking at one original told: why it is no image, or ""; its size in px; whether it is gray."""

    reason: str
    width: int
    height: int
    gray: bool


@dataclass(frozen=True)
class Done:
    """A finished shard. late: originals, by place in the shard, that turned out not to decode, and why."""

    first: int
    count: int
    late: dict[int, str]
    files: dict[str, File]

    def whole(self, dst: Path) -> bool:
        """Whether all files are there in the size they had."""
        try:
            return all(os.stat(dst / name).st_size == file.bytes for name, file in self.files.items())
        except OSError:
            return False


def looked(state: Unfinished, shard: int) -> list[Looked]:
    return [Looked(*row) for row in state.read("looked", shard)]


def done(state: Unfinished, shard: int) -> Done | None:
    if not state.has("done", shard):
        return None
    content = state.read("done", shard)
    late = {int(at): reason for at, reason in content["late"].items()}
    files = {name: File(**one) for name, one in content["files"].items()}
    return Done(content["first"], content["count"], late, files)


def rejected(rows: list[Looked], plan: Plan) -> dict[int, str]:
    """The originals of a shard that are not used, by place, and why."""
    out = {}
    for at, one in enumerate(rows):
        if one.reason:
            out[at] = one.reason
        elif plan.extent(one.width, one.height) < plan.min_size:
            out[at] = f"too small: {one.width} x {one.height}, smaller than {plan.min_size} px"
    return out


def look(shard: int) -> None:
    """Write down what opening each original of a shard tells."""
    originals, state = _shared()
    rows: list[tuple[Any, ...]] = []
    for item in state.items(shard):
        if item.reason:
            rows.append((item.reason, 0, 0, True))
        else:
            found = originals.check(item)
            rows.append((found.reason, *found.size, is_gray(found.mode)))
        tick()
    state.write("looked", shard, rows)


def measure(shard: int, count: int, plan: Plan) -> list[int]:
    """Bytes that some images of a shard take in tars, all encoded resolutions together."""
    originals, state = _shared()
    items, reasons = state.items(shard), rejected(looked(state, shard), plan)
    used = [item for at, item in enumerate(items) if at not in reasons]
    sizes = []
    for item in used[:: max(1, len(used) // count)][:count]:
        pixels, _ = _decode(originals, item, plan)
        if pixels is not None:
            levels = pyramid(pixels, plan.encoded).values()
            files = [encode(level, plan.encoding, plan.quality) for level in levels]
            # A tar has a header of 512 bytes before each member, and fills it up to as many; so for the label.
            sizes.append(sum(len(one) + 512 + -len(one) % 512 + 1024 * bool(plan.num_classes) for one in files))
        tick()
    return sizes


def encode_shard(shard: int, first: int, plan: Plan) -> None:
    """Write all files of a shard, whose images begin at global index `first`, and then that it is done."""
    _, state = _shared()
    items, reasons = state.items(shard), rejected(looked(state, shard), plan)
    used = [at for at in range(len(items)) if at not in reasons]
    late: dict[int, str] = {}
    files = _write(shard, first, used, items, late, plan, tick)
    if late:
        # What was begun has room for those that did not decode. Now that they are known, it is written without them.
        used = [at for at in used if at not in late]
        files = _write(shard, first, used, items, {}, plan, lambda count: None)
    _record(state, shard, Done(first, len(used), late, files))


def renumber_shard(shard: int, first: int, plan: Plan) -> None:
    """Let the images of a finished shard begin at another global index."""
    _, state = _shared()
    found = done(state, shard)
    assert found is not None
    files = dict(found.files)
    for r in plan.encoded:
        files |= renumber(state.dst, shard, r, first, SUFFIXES[plan.encoding])
    _record(state, shard, Done(first, found.count, found.late, files))


def _write(
    shard: int,
    first: int,
    used: list[int],
    items: list[Item],
    late: dict[int, str],
    plan: Plan,
    said: Callable[[int], object],
) -> dict[str, File]:
    """The files of a shard of the originals `used`; none, and the reasons in `late`, if some do not decode."""
    originals, state = _shared()
    with ShardWriter(
        state.dst,
        shard,
        first,
        len(used),
        channels=plan.channels,
        resolutions=plan.resolutions,
        cached=plan.cached,
        encoding=plan.encoding,
        quality=plan.quality,
    ) as writer:
        for at in used:
            pixels, reason = _decode(originals, items[at], plan)
            if pixels is None:
                late[at] = reason
            elif not late:
                writer.add(pixels, plan.label(items[at]))
            said(1)
        return {} if late else writer.finish()


def _decode(originals: Originals, item: Item, plan: Plan) -> tuple[np.ndarray | None, str]:
    """The pixels at the target resolution, or why there are none."""
    try:
        return originals.pixels(item, plan.resolutions[-1], plan.channels, plan.fit), ""
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise gone(item, error) from error
        return None, first_line(error)


def _record(state: Unfinished, shard: int, finished: Done) -> None:
    state.write("done", shard, asdict(finished))


def _shared() -> tuple[Originals, Unfinished]:
    originals, dst = shared()
    return originals, Unfinished(dst)
