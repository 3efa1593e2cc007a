"""`fastgan prepare`: from originals to a prepared set, over all cores, going on where a killed one stopped.

The originals are listed, looked at (which of them are images, how large, gray or not), and then decoded and written,
`per_shard` at a time; a shard is finished or not begun. Names, labels and the manifest come last. What is written
depends on the originals and the settings alone: not on workers, interruptions, folders or times.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data import prepared
from fastgan.data.preparation.encoding import (
    Done,
    Plan,
    done,
    encode_shard,
    look,
    looked,
    measure,
    rejected,
    renumber_shard,
)
from fastgan.data.preparation.inputs import open_originals
from fastgan.data.preparation.originals import Item, Originals, printable
from fastgan.data.preparation.shards import read_index
from fastgan.data.preparation.unfinished import Unfinished, changed, difference, locked
from fastgan.data.preparation.workers import Workers
from fastgan.data.prepared import Manifest, Shard
from fastgan.errors import ArgumentError
from fastgan.utils.files import AtomicFile, File, array_header, write_atomic
from fastgan.utils.system import cpu_count
from fastgan.utils.text import readable_size

_SAID = 10  # files that are named when they cannot be used; skipped.txt names them all
_SAMPLE = 64  # images encoded to estimate how much room all of them take
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What decides, besides the originals, which bytes are written. See `prepare`."""

    resolution: int | None = None
    channels: int | None = None
    cache_to: int = 128
    quality: int = 95
    lossless: str | None = None
    fit: bool = False
    min_size: int | None = None
    per_shard: int = 1024

    def check(self) -> None:
        """Raises: ArgumentError for a value that is out of range."""
        if self.resolution is not None and not _is_resolution(self.resolution):
            raise ArgumentError("--resolution", self.resolution, "must be a power of two from 4")
        if self.channels not in (None, 1, 3):
            raise ArgumentError("--channels", self.channels, "must be 1 or 3")
        if self.cache_to and not _is_resolution(self.cache_to):
            raise ArgumentError("--cache-to", self.cache_to, "must be a power of two from 4, or 0 for nothing")
        if not 1 <= self.quality <= 100:
            raise ArgumentError("--quality", self.quality, "must be 1 to 100")
        if self.lossless not in (None, "png", "webp"):
            raise ArgumentError("--lossless", self.lossless, "must be png or webp")
        if self.min_size is not None and self.min_size < 1:
            raise ArgumentError("--min-size", self.min_size, "must be at least 1 pixels")
        if self.per_shard < 1:
            raise ArgumentError("--per-shard", self.per_shard, "must be at least 1 images")


def prepare(
    src: str,
    dst: str | Path,
    settings: Settings | None = None,
    *,
    strict: bool = False,
    workers: int = 0,
    progress: bool = False,
    say: Callable[[str], object] = logger.info,
) -> Manifest:
    """Make DST the prepared set of SRC; docs/data.md describes both. Call it again after an interruption to go on.

    strict: refuse originals that cannot be used, instead of skipping them. workers: processes, 0 for one per core.
    progress: bars on stderr, where that is a terminal. say: takes a line at a time.

    With more than one worker, a script that calls this does so below `if __name__ == "__main__":`, as processes are
    started by importing it.

    Raises: ArgumentError if SRC or DST cannot be what they are, settings or originals differ from those DST was
    begun with, a file cannot be written, or the disk is too small; what is finished is kept.
    """
    settings = settings or Settings()
    settings.check()
    if workers < 0:
        raise ArgumentError("--workers", workers, "must be at least 0 (one per core)")
    originals = open_originals(src)
    if settings.channels is not None and originals.channels not in (None, settings.channels):
        may_be = f"{originals.kind} has {originals.channels}; it may be left out"
        raise ArgumentError("--channels", settings.channels, may_be)
    if originals.largest is not None and (settings.resolution or 0) > originals.largest:
        raise ArgumentError("--resolution", settings.resolution, f"{src} has at most {originals.largest} px")
    dst = Path(dst).expanduser()
    if originals.path is not None:
        _keep_apart(originals.path, dst)
    if prepared.is_prepared(dst):
        return _again(originals, dst, settings, say)
    with locked(dst) as state, Workers(workers or cpu_count(), (originals, dst)) as pool:
        try:
            return _Preparation(originals, dst, state, settings, strict, pool, progress, say).run()
        except OSError as error:
            reason = f"{error.filename or dst}: {error.strerror or error}"
            may_be = f"it cannot be written ({reason}); what is finished is kept, and the same command goes on"
            raise ArgumentError("DST", str(dst), may_be) from error


class _Preparation:
    def __init__(
        self,
        originals: Originals,
        dst: Path,
        state: Unfinished,
        settings: Settings,
        strict: bool,
        pool: Workers,
        progress: bool,
        say: Callable[[str], object],
    ) -> None:
        self._originals, self._dst, self._state, self._settings = originals, dst, state, settings
        self._strict, self._pool, self._progress, self._say = strict, pool, progress, say

    def run(self) -> Manifest:
        self._compare_settings()
        count = self._list()
        shards = -(-count // self._settings.per_shard)
        self._look(shards, count)
        plan = self._plan(shards)
        self._encode(plan, self._counts(shards, plan))
        return self._finish(plan, shards)

    def _compare_settings(self) -> None:
        """Go on only with what was begun; as long as no shard is finished, anything may still be asked for."""
        asked = {**_flags(self._settings), "SRC": _shown(self._originals), **_versions()}
        begun = self._state.note("asked.json") or {}
        if not self._state.any_done():
            # The list, and what looking told, hold for other settings too, of the same originals in the same shards.
            if any(begun.get(name) != asked[name] for name in ("SRC", "--per-shard", *_versions())):
                self._state.forget()
            self._state.write_note("asked.json", asked)
            return
        differs = difference(begun, asked)
        if differs:
            name, was, now = differs
            raise ArgumentError(name, now, f"{self._dst} was begun with {was!r}; delete it to begin anew")

    def _list(self) -> int:
        """Write the list of originals, or see that it is still the same: how many there are."""
        listed = self._state.note("listed.json")
        with self._bar(None, "listing", "files") as bar:
            if listed is not None:
                items = _listed(self._originals, bar.update)
                what = changed(self._state, listed["count"], self._settings.per_shard, items)
                if not what:
                    return listed["count"]
                if self._state.any_done():
                    may_be = f"it is not what {self._dst} was begun with: {what}; delete {self._dst} to begin anew"
                    raise ArgumentError("SRC", _shown(self._originals), may_be)
                self._state.forget()
                bar.reset()
            try:
                count, digest = self._write_list(_listed(self._originals, bar.update))
            except ArgumentError:
                if not self._state.any_done():
                    self._state.clear()
                raise
        if not count:
            raise self._useless("it is empty")
        self._state.write_note("listed.json", {"count": count, "digest": digest})
        return count

    def _write_list(self, items: Iterator[Item]) -> tuple[int, str]:
        """How many there are, and what stands for all of them."""
        count, digest, shards = 0, hashlib.sha256(), itertools.count()
        while part := list(itertools.islice(items, self._settings.per_shard)):
            for item in part:
                digest.update(self._originals.identity(item))
            self._state.write("items", next(shards), part)
            count += len(part)
        return count, digest.hexdigest()[:16]

    def _look(self, shards: int, count: int) -> None:
        waiting = [shard for shard in range(shards) if not self._state.has("looked", shard)]
        per_shard = self._settings.per_shard
        left = sum(min(per_shard, count - shard * per_shard) for shard in waiting)
        with self._bar(count, "looking", "files") as bar:
            bar.update(count - left)
            for _ in self._pool.run(look, ((shard,) for shard in waiting), bar.update):
                pass

    def _plan(self, shards: int) -> Plan:
        """What to write, from what looking at all originals told."""
        asked, originals = self._settings, self._originals
        reach: Counter[int] = Counter()  # of the images, the largest power of two that they reach
        gray, kinds, classes, highest, first = True, set(), set(), -1, ""
        for shard in range(shards):
            for item, one in zip(self._state.items(shard), looked(self._state, shard), strict=True):
                if one.reason:
                    first = first or f"{printable(item.name)}: {printable(one.reason)}"
                    continue
                extent = max(one.width, one.height) if asked.fit else min(one.width, one.height)
                reach[1 << max(extent.bit_length() - 1, 0)] += 1
                gray &= one.gray
                kinds.add(type(item.label))
                if isinstance(item.label, str):
                    classes.add(item.label)
                elif item.label is not None:
                    highest = max(highest, item.label)
        if not reach:
            raise self._useless(f"none of its files is an image (first: {first})")
        if len(kinds) > 1:
            self._say("no labels: only some of the images have one, or some a number and others a name")
        resolution = asked.resolution or originals.usual or _usual(reach)
        resolutions = tuple(2**i for i in range(2, resolution.bit_length()))
        return Plan(
            resolutions=resolutions,
            cached=tuple(r for r in resolutions if r <= asked.cache_to),
            channels=asked.channels or originals.channels or (1 if gray else 3),
            encoding=asked.lossless or "jpeg",
            quality=asked.quality,
            fit=asked.fit,
            min_size=asked.min_size or (1 if originals.one_size else resolution),
            num_classes=0 if len(kinds) > 1 else originals.num_classes or len(classes) or highest + 1,
            ranks={name: rank for rank, name in enumerate(sorted(classes))} if len(kinds) == 1 else {},
        )

    def _counts(self, shards: int, plan: Plan) -> list[int]:
        """The images of each shard, as far as looking tells."""
        counts, skipped, first = [], 0, ""
        for shard in range(shards):
            rows = looked(self._state, shard)
            reasons = rejected(rows, plan)
            counts.append(len(rows) - len(reasons))
            items = self._state.items(shard) if reasons and skipped < _SAID else []
            for at, reason in reasons.items():
                skipped += 1
                if skipped <= _SAID:
                    line = f"{printable(items[at].name)}: {printable(reason)}"
                    first = first or line
                    self._say(f"cannot use {line}")
        if skipped > _SAID:
            self._say(f"cannot use {skipped - _SAID:,} more files")
        if self._strict and skipped:
            raise self._useless(f"--strict: {skipped:,} of its files cannot be used (first: {first})")
        if not sum(counts):
            may_be = "a smaller --resolution or --min-size may do"
            raise self._useless(f"none of its images can be used (first: {first}); {may_be}")
        return counts

    def _useless(self, why: str) -> ArgumentError:
        """Nothing of a set can be made: nothing is left behind either, but what was finished under other terms."""
        if not self._state.any_done():
            self._state.clear()
        return ArgumentError("SRC", _shown(self._originals), why)

    def _fit_disk(self, waiting: dict[int, int], plan: Plan) -> None:
        """Refuse what the disk has no room for, before it is full. waiting: images of the shards to be written."""
        count = sum(waiting.values())
        each: float = sum(plan.channels * r * r for r in plan.cached) + 300  # and its line in the lists
        if plan.encoded and count:
            chosen = sorted(waiting)[:: max(1, len(waiting) // 16)]
            share = -(-_SAMPLE // len(chosen))
            with self._bar(share * len(chosen), "estimating", "images") as bar:
                jobs = ((shard, share, plan) for shard in chosen)
                sizes = np.array([size for part in self._pool.run(measure, jobs, bar.update) for size in part])
            if len(sizes):
                # Two standard errors above the mean: what is refused as too much is too much.
                each += float(sizes.mean() + 2 * sizes.std() / len(sizes) ** 0.5)
        need, free = round(count * each), shutil.disk_usage(self._dst).free
        if need > free:
            may_be = f"it needs about {readable_size(need)} and the disk has {readable_size(free)} free"
            raise ArgumentError("DST", str(self._dst), may_be)
        if count:
            self._say(f"{count:,} images to write, about {readable_size(need)}; {readable_size(free)} are free")

    def _encode(self, plan: Plan, counts: list[int]) -> None:
        """Write the shards that are not finished."""
        finished = {shard: found for shard in range(len(counts)) if (found := self._finished(shard))}
        waiting = {shard: count for shard, count in enumerate(counts) if shard not in finished}
        self._fit_disk(waiting, plan)
        expected = [finished[shard].count if shard in finished else count for shard, count in enumerate(counts)]
        firsts = [0, *itertools.accumulate(expected)]
        del finished
        with self._bar(sum(counts), "encoding", "images") as bar:
            bar.update(sum(counts) - sum(waiting.values()))
            jobs = ((shard, firsts[shard], plan) for shard in waiting)
            for _ in self._pool.run(encode_shard, jobs, bar.update):
                pass

    def _finished(self, shard: int) -> Done | None:
        found = done(self._state, shard)
        return found if found is not None and found.whole(self._dst) else None

    def _finish(self, plan: Plan, shards: int) -> Manifest:
        """The lists over all shards, and the manifest."""
        ends, moved, first, late = [], [], 0, 0
        for shard in range(shards):
            found = done(self._state, shard)
            assert found is not None
            ends.append(Shard(first, found.count))
            if found.first != first and plan.encoded:
                moved.append((shard, first, plan))
            first += found.count
            late += len(found.late)
        if late and self._strict:
            may_be = f"--strict: {late:,} of its files cannot be decoded; without it they are skipped"
            raise ArgumentError("SRC", _shown(self._originals), may_be)
        if not first:
            self._state.clear(everything=True)
            raise ArgumentError("SRC", _shown(self._originals), "none of its images can be decoded")
        with self._bar(len(moved), "renumbering", "shards") as bar:
            for _ in self._pool.run(renumber_shard, moved, lambda count: None):
                bar.update()
        files, skipped = self._lists(plan, ends)
        listed = self._state.note("listed.json")
        assert listed is not None
        settings = asdict(self._settings)
        manifest = Manifest(
            path=self._dst,
            version=_versions()["fastgan"],
            count=first,
            channels=plan.channels,
            resolution=plan.resolutions[-1],
            resolutions=plan.resolutions,
            cached=plan.cached,
            encoding=plan.encoding,
            num_classes=plan.num_classes,
            fingerprint=prepared.fingerprint(files, settings),
            settings=settings,
            source={"kind": self._originals.kind, "name": self._originals.name, "digest": listed["digest"]},
            skipped=skipped,
            shards=tuple(ends),
            files=files,
        )
        prepared.write_manifest(manifest)
        self._state.clear()
        return manifest

    def _lists(self, plan: Plan, shards: list[Shard]) -> tuple[dict[str, File], int]:
        """Names, labels, places and what was skipped, one shard after another; the files of all, and how many."""
        total = sum(shard.count for shard in shards)
        headers: dict[str, bytes] = {prepared.NAMES: b"", prepared.SKIPPED: b""}
        headers |= {prepared.offsets_file(r): array_header("<i8", (total, 2)) for r in plan.encoded}
        if plan.num_classes:
            headers[prepared.LABELS] = array_header("<i8", (total,))
        files: dict[str, File] = {}
        skipped = 0
        with ExitStack() as stack:
            outs = {name: AtomicFile(self._dst / name) for name in headers}
            for name, out in outs.items():
                stack.callback(out.abandon)
                out.write(headers[name])
            for shard in range(len(shards)):
                found = done(self._state, shard)
                assert found is not None
                files |= found.files
                items = self._state.items(shard)
                reasons = rejected(looked(self._state, shard), plan) | found.late
                skipped += len(reasons)
                lines = (
                    f"{printable(items[at].name)}\t{printable(reason)}\n" for at, reason in sorted(reasons.items())
                )
                outs[prepared.SKIPPED].write("".join(lines).encode())
                used = [item for at, item in enumerate(items) if at not in reasons]
                outs[prepared.NAMES].write("".join(json.dumps(item.name) + "\n" for item in used).encode())
                if plan.num_classes:
                    outs[prepared.LABELS].write(np.array([plan.label(item) for item in used], "<i8").tobytes())
                for r in plan.encoded:
                    places = read_index((self._dst / prepared.index_file(r, shard)).read_bytes())
                    outs[prepared.offsets_file(r)].write(places.astype("<i8").tobytes())
            files |= {name: out.finish() for name, out in outs.items()}
        classes = sorted(plan.ranks, key=plan.ranks.__getitem__) if plan.ranks else self._originals.classes
        if plan.num_classes and classes:
            content = json.dumps(classes, indent=1).encode()
            files[prepared.CLASSES] = write_atomic(self._dst / prepared.CLASSES, content)
        return files, skipped

    def _bar(self, total: int | None, what: str, unit: str) -> Any:
        from tqdm import tqdm

        disable = None if self._progress else True  # None: where stderr is no terminal
        return tqdm(total=total, desc=what, unit=f" {unit}", disable=disable, dynamic_ncols=True, smoothing=0.1)


def _again(originals: Originals, dst: Path, settings: Settings, say: Callable[[str], object]) -> Manifest:
    """What is finished already is left as it is, if it is the same that is asked for."""
    manifest = prepared.read_manifest(dst, "DST")
    asked = {**_flags(settings), "SRC": _shown(originals)}
    # What an older version did not know, it did as the default does now.
    known = asdict(Settings()) | {
        name: manifest.settings[name] for name in asdict(settings) if name in manifest.settings
    }
    made = {**_flags(Settings(**known)), "SRC": f"{manifest.source['kind']} {manifest.source['name']}"}
    differs = difference(made, asked)
    if differs:
        name, was, now = differs
        raise ArgumentError(name, now, f"{dst} was prepared with {was!r}; delete it or name another DST")
    digest = hashlib.sha256()
    for item in _listed(originals):
        digest.update(originals.identity(item))
    if digest.hexdigest()[:16] != manifest.source["digest"]:
        may_be = f"it is not what {dst} was prepared from, which may be deleted to begin anew"
        raise ArgumentError("SRC", _shown(originals), may_be)
    if Unfinished(dst).folder.is_dir():  # killed after the manifest was written
        with locked(dst) as state:
            state.clear()
    say(f"{dst} is prepared already")
    return manifest


def _keep_apart(src: Path, dst: Path) -> None:
    src, dst = src.resolve(), dst.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise ArgumentError("DST", str(dst), f"must be a folder that neither lies in {src} nor holds it")


def _listed(originals: Originals, update: Callable[[int], object] = lambda count: None) -> Iterator[Item]:
    """All originals, counted.

    Raises: ArgumentError also where they cannot be read.
    """
    try:
        for item in originals.items():
            yield item
            update(1)
    except OSError as error:
        may_be = f"it cannot be read ({error.filename or originals.path}: {error.strerror or error})"
        raise ArgumentError("SRC", _shown(originals), may_be) from error


def _usual(reach: Counter[int]) -> int:
    """The resolution where none was asked for: the largest up to 1024 that 19 of 20 images have."""
    total = sum(reach.values())
    for resolution in (1024, 512, 256, 128, 64, 32, 16, 8):
        if 20 * sum(count for power, count in reach.items() if power >= resolution) >= 19 * total:
            return resolution
    return 4


def _flags(settings: Settings) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in asdict(settings).items()}


def _shown(originals: Originals) -> str:
    return f"{originals.kind} {originals.name}"


@functools.cache
def _versions() -> dict[str, str]:
    """What else decides the bytes: other versions may encode otherwise."""
    try:
        own = importlib.metadata.version("fastgan")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        own = "unknown"
    return {"fastgan": own, "pillow": importlib.metadata.version("pillow")}


def _is_resolution(value: int) -> bool:
    return value >= 4 and value & (value - 1) == 0
