"""`fastgan prepare`: from an input collection to a prepared set, on all cores, resuming where a killed one stopped.

The images are listed, inspected (are they usable, how large, gray or not), then decoded and written, `per_shard` at a
time; a shard is finished or not started. Tables and manifest come last. The written bytes depend on the images and the
settings alone, and not on workers, interruptions, folders or times.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.preparation.assembly import assemble
from fastgan.data.preparation.collection import InputCollection
from fastgan.data.preparation.context import Context
from fastgan.data.preparation.inputs import open_collection
from fastgan.data.preparation.jobs import encode_shard, inspect_shard, sample_sizes
from fastgan.data.preparation.listing import digest_of, iterate, listing_change, write_list
from fastgan.data.preparation.output import OutputFormat, choose_output
from fastgan.data.preparation.settings import Settings, versions
from fastgan.data.preparation.state import FinishedShard, PreparationState, lock_destination
from fastgan.data.preparation.workers import WorkerPool
from fastgan.data.prepared.manifest import Manifest, is_prepared, read_manifest
from fastgan.errors import ArgumentError, printable
from fastgan.utils.system import MAX_THREADS, cpu_count
from fastgan.utils.text import readable_size

_MAX_REPORTED = 10  # rejected files that are reported; skipped.txt lists them all
_SAMPLE = 64  # images encoded to estimate the size of all
logger = logging.getLogger(__name__)


def prepare(
    src: str,
    dst: str | Path,
    settings: Settings | None = None,
    *,
    strict: bool = False,
    workers: int = 0,
    progress: bool = False,
    report: Callable[[str], object] = logger.info,
) -> Manifest:
    """Make DST the prepared set of SRC; docs/data.md describes both. After an interruption, call it again to continue.

    With more than one worker, a script must call this below `if __name__ == "__main__":`, because worker processes
    import the script.

    Args:
        src: folder, archive, published set or prepared set.
        dst: a new or empty folder, or one of an interrupted call.
        settings: what to write.
        strict: refuse images that cannot be used, instead of skipping them.
        workers: processes; 0 for one per core.
        progress: show progress bars on stderr, if it is a terminal.
        report: called with one line at a time.

    Raises:
        ArgumentError: SRC or DST is unusable, settings or images differ from those DST was started with, a file
            cannot be written, or the disk is too small. Finished shards are kept.
    """
    settings = settings or Settings()
    settings.validate()
    if workers < 0:
        raise ArgumentError("--workers", workers, "must be at least 0; 0 is one per core")
    if workers > MAX_THREADS:
        raise ArgumentError("--workers", workers, f"must be at most {MAX_THREADS}")
    collection = open_collection(src)
    if settings.channels is not None and collection.channels not in (None, settings.channels):
        problem = f"is not needed with {collection.kind}, which has {collection.channels}: remove it"
        raise ArgumentError("--channels", settings.channels, problem)
    if collection.max_resolution is not None and (settings.resolution or 0) > collection.max_resolution:
        problem = f"must be at most {collection.max_resolution}, the resolution of {src}"
        raise ArgumentError("--resolution", settings.resolution, problem)
    dst = Path(dst).expanduser()
    if collection.path is not None:
        _require_separate(collection.path, dst)
    if is_prepared(dst, "DST"):
        return _existing(collection, dst, settings, report)
    with lock_destination(dst) as state, WorkerPool(workers or cpu_count(), (collection, dst)) as pool:
        try:
            return _run(Context(collection, state, settings, strict, pool, progress, report))
        except OSError as error:
            reason = f"{error.filename or dst}: {error.strerror or error}"
            hint = "finished shards are kept; run the same command again to continue"
            raise ArgumentError("DST", str(dst), f"it cannot be written ({reason}); {hint}") from error


def _run(context: Context) -> Manifest:
    _require_same_settings(context)
    count = _list(context)
    shards = -(-count // context.settings.per_shard)
    _inspect(context, shards, count)
    output = choose_output(context, shards)
    _encode(context, output, _usable_counts(context, shards, output))
    return assemble(context, output, shards)


def _require_same_settings(context: Context) -> None:
    """Resume only with the same settings and images; until a shard is finished, both may change."""
    requested = {**context.settings.flags(), "SRC": context.collection.title, **versions()}
    started = context.state.note("asked.json") or {}
    if context.state.any_finished():
        dst = context.state.dst
        _require_equal(started, requested, f"{dst} was started with", "delete it to start again")
        return
    # The list and the inspections are valid with other settings too, if images and shards are the same.
    if any(started.get(name) != requested[name] for name in ("SRC", "--per-shard", *versions())):
        context.state.forget_images()
    context.state.write_note("asked.json", requested)


def _list(context: Context) -> int:
    """Write the list of images, or check that the stored one is still right; return their number."""
    listed = context.state.note("listed.json")
    with context.bar("listing", None, "files") as bar:
        if listed is not None:
            images = iterate(context.collection, bar.update)
            change = listing_change(context.state, listed["count"], context.settings.per_shard, images)
            if not change:
                return listed["count"]
            if context.state.any_finished():
                dst = context.state.dst
                problem = f"it has changed since {dst} was started: {change}; delete {dst} to start again"
                raise ArgumentError("SRC", context.collection.title, problem)
            context.state.forget_images()
            bar.reset()
        try:
            images = iterate(context.collection, bar.update)
            count, digest = write_list(context.state, context.collection, context.settings.per_shard, images)
        except ArgumentError:
            if not context.state.any_finished():
                context.state.remove()
            raise
    if not count:
        raise context.unusable("it is empty")
    context.state.write_note("listed.json", {"count": count, "digest": digest})
    return count


def _inspect(context: Context, shards: int, count: int) -> None:
    missing = [shard for shard in range(shards) if not context.state.has("looked", shard)]
    per_shard = context.settings.per_shard
    left = sum(min(per_shard, count - shard * per_shard) for shard in missing)
    with context.bar("inspecting", count, "files") as bar:
        bar.update(count - left)
        for _ in context.pool.run(inspect_shard, ((shard,) for shard in missing), bar.update):
            pass


def _usable_counts(context: Context, shards: int, output: OutputFormat) -> list[int]:
    """The number of usable images of each shard, as far as inspecting shows."""
    counts, skipped, first = [], 0, ""
    for shard in range(shards):
        inspections = context.state.inspections(shard)
        rejected = output.rejections(inspections)
        counts.append(len(inspections) - len(rejected))
        images = context.state.images(shard) if rejected and skipped < _MAX_REPORTED else []
        for at, problem in rejected.items():
            skipped += 1
            if skipped <= _MAX_REPORTED:
                line = f"{printable(images[at].name)}: {printable(problem)}"
                first = first or line
                context.report(f"cannot use {line}")
    if skipped > _MAX_REPORTED:
        context.report(f"cannot use {skipped - _MAX_REPORTED:,} more files")
    if context.strict and skipped:
        raise context.unusable(f"--strict: {skipped:,} of its files cannot be used (first: {first})")
    if not sum(counts):
        hint = "use a smaller --resolution or --min-size"
        raise context.unusable(f"none of its images can be used (first: {first}); {hint}")
    return counts


def _require_space(context: Context, pending: dict[int, int], output: OutputFormat) -> None:
    """Raise ArgumentError if the disk is too small. pending: shard -> number of images to write."""
    count = sum(pending.values())
    each: float = sum(output.channels * r * r for r in output.cached) + 300  # 300: its lines in the tables
    if output.encoded and count:
        chosen = sorted(pending)[:: max(1, len(pending) // 16)]
        share = -(-_SAMPLE // len(chosen))
        with context.bar("estimating", share * len(chosen), "images") as bar:
            jobs = ((shard, share, output) for shard in chosen)
            sizes = np.array([size for part in context.pool.run(sample_sizes, jobs, bar.update) for size in part])
        if len(sizes):
            each += float(sizes.mean() + 2 * sizes.std() / len(sizes) ** 0.5)  # 2 standard errors above the mean
    need, free = round(count * each), shutil.disk_usage(context.state.dst).free
    if need > free:
        problem = f"it needs about {readable_size(need)}, and the disk has {readable_size(free)} free"
        raise ArgumentError("DST", str(context.state.dst), problem)
    if count:
        context.report(f"{count:,} images to write, about {readable_size(need)}; {readable_size(free)} are free")


def _encode(context: Context, output: OutputFormat, counts: list[int]) -> None:
    """Write the shards that are not finished. counts: usable images of each shard."""
    expected, pending = list(counts), {}
    for shard, count in enumerate(counts):
        finished = _finished(context, shard)
        if finished is None:
            pending[shard] = count
        else:
            expected[shard] = finished.count
    _require_space(context, pending, output)
    firsts = [0, *itertools.accumulate(expected)]
    with context.bar("encoding", sum(counts), "images") as bar:
        bar.update(sum(counts) - sum(pending.values()))
        jobs = ((shard, firsts[shard], output) for shard in pending)
        for _ in context.pool.run(encode_shard, jobs, bar.update):
            pass


def _finished(context: Context, shard: int) -> FinishedShard | None:
    """The record of a finished shard whose files are all there."""
    if not context.state.has("done", shard):
        return None
    finished = context.state.finished(shard)
    return finished if finished.is_complete(context.state.dst) else None


def _existing(collection: InputCollection, dst: Path, settings: Settings, report: Callable[[str], object]) -> Manifest:
    """Return the manifest of a finished DST, if it was made from the same images with the same settings."""
    manifest = read_manifest(dst, "DST")
    requested = {**settings.flags(), "SRC": collection.title}
    # A setting that the version which wrote the set did not have has its default.
    stored = {name: manifest.settings[name] for name in asdict(settings) if name in manifest.settings}
    made = {**Settings(**stored).flags(), "SRC": f"{manifest.source['kind']} {manifest.source['name']}"}
    _require_equal(made, requested, f"{dst} was prepared with", "delete it or use another DST")
    if digest_of(collection) != manifest.source["digest"]:
        problem = f"it has changed since {dst} was prepared; delete {dst} to start again"
        raise ArgumentError("SRC", collection.title, problem)
    if PreparationState(dst).folder.is_dir():  # a kill after the manifest was written
        with lock_destination(dst) as state:
            state.remove()
    report(f"{dst} is already prepared")
    return manifest


def _require_equal(stored: dict[str, Any], requested: dict[str, Any], problem: str, hint: str) -> None:
    """Raise ArgumentError for the first setting that differs. problem: what precedes its stored value."""
    for name in sorted(stored.keys() | requested.keys()):
        if stored.get(name) != requested.get(name):
            raise ArgumentError(name, requested.get(name), f"{problem} {stored.get(name)!r}; {hint}")


def _require_separate(src: Path, dst: Path) -> None:
    src, dst = src.resolve(), dst.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise ArgumentError("DST", str(dst), f"must be a folder outside {src} that does not hold it")
