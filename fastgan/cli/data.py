"""Print or verify the contents of a prepared set, or show those of any data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastgan.cli.main import check_picture, command, writing
from fastgan.cli.output import say
from fastgan.errors import ArgumentError, printable

if TYPE_CHECKING:
    from fastgan.data.prepared.manifest import Manifest


@dataclass(frozen=True)
class Info:
    """Print the contents of a prepared set."""

    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder of the set."""


@dataclass(frozen=True)
class Verify:
    """Read every file, compare it with its hash, and list files that are missing, truncated, changed or foreign.

    The exit code is 1 if there are any.
    """

    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder of the set."""
    workers: int = 0
    """Number of threads; 0: one per core."""


@dataclass(frozen=True)
class Show:
    """Write some of the images, as training sees them, to one PNG, with their classes."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A prepared set, a folder of images, or other images, as --data of fastgan train."""
    n: int = 64
    """Number of images."""
    resolution: int | None = None
    """Resolution of the images, px; None: 64, of a prepared set the largest up to 128."""
    channels: int | None = None
    """As for fastgan train; so are fit and background."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How an image that is no square becomes one."""
    background: str = "white"
    """Color of padding and behind transparent parts."""
    start: int = 0
    """Index of the first image."""
    seed: int | None = 0
    """Shuffle the images with this seed first; None: the order of the set."""
    out: str | None = None
    """File to write; None: NAME-RESOLUTIONpx.png in the current folder."""


@command
def main(argv: list[str]) -> int:
    request = tyro.cli(
        Annotated[Info, tyro.conf.subcommand("info")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Show, tyro.conf.subcommand("show")],
        args=argv,
        prog="fastgan data",
        description=__doc__,
    )
    if isinstance(request, Show):
        try:
            return _show(request)
        except ArgumentError as error:
            raise error.renamed("DATA") if error.argument == "--data" else error from None
    from fastgan.data.prepared.manifest import read_manifest

    manifest = read_manifest(Path(request.dst).expanduser(), "DST")
    if isinstance(request, Info):
        say(table(manifest))
        return 0
    return _verify(manifest, request.workers)


def table(manifest: Manifest) -> str:
    """Return the contents of a prepared set as lines of text."""
    from fastgan.data.prepared.manifest import SKIPPED
    from fastgan.utils.text import readable_size

    settings = ", ".join(f"{name} {value}" for name, value in sorted(manifest.settings.items()) if value is not None)
    classes = manifest.classes("DST")
    names = "" if classes is None else f": {', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}"
    sizes = [file.bytes for file in manifest.files.values()]
    facts = {
        "images": f"{manifest.count:,}, {'gray' if manifest.channels == 1 else 'color'}",
        "classes": f"{manifest.num_classes:,}{names}" if manifest.num_classes else "no labels",
        "skipped": f"{manifest.skipped:,}" + (f", listed in {manifest.path / SKIPPED}" if manifest.skipped else ""),
        "source": f"{manifest.source.get('kind')} {manifest.source.get('name')}",
        "settings": settings,
        "made by": f"fastgan {manifest.version}",
        "fingerprint": manifest.fingerprint,
        "on disk": f"{readable_size(sum(sizes))} in {len(sizes):,} files, {len(manifest.shards):,} shards",
    }
    lines = [str(manifest.path), *(f"  {name:12} {printable(value)}" for name, value in facts.items()), ""]
    lines.append(f"  {'px':>5}  {'stored as':10} {'on disk':>10} {'per image':>12}")
    for r in manifest.resolutions:
        stored_as = "arrays" if r in manifest.cached else manifest.encoding
        size = sum(manifest.files[name].bytes for name in manifest.files_of(r))
        lines.append(f"  {r:>5}  {stored_as:10} {readable_size(size):>10} {readable_size(size / manifest.count):>12}")
    return "\n".join(lines)


def _verify(manifest: Manifest, workers: int) -> int:
    from tqdm import tqdm

    from fastgan.data.preparation.verification import verify
    from fastgan.utils.system import MAX_THREADS
    from fastgan.utils.text import readable_size

    if workers < 0:
        raise ArgumentError("--workers", workers, "must be at least 0; 0 is one per core")
    if workers > MAX_THREADS:
        raise ArgumentError("--workers", workers, f"must be at most {MAX_THREADS}")
    faults = 0
    for fault in verify(manifest, workers=workers, progress=True):
        faults += 1
        tqdm.write(f"{manifest.path / printable(fault.name)} {fault.problem}")
    if faults:
        files = "1 file is" if faults == 1 else f"{faults:,} files are"
        say(f"fastgan: {files} wrong; copy the set again, or delete it and prepare it again", error=True)
        return 1
    size = readable_size(sum(file.bytes for file in manifest.files.values()))
    say(f"{manifest.path}: all {len(manifest.files):,} files, {size}, are as they were written")
    return 0


def _show(request: Show) -> int:
    import numpy as np

    from fastgan.data import open_source
    from fastgan.data.loading.sampler import Sampler
    from fastgan.data.sheets import save_sheet

    if request.n < 1:
        raise ArgumentError("--n", request.n, "must be at least 1")
    resolution = _shown_resolution(request)
    source = open_source(request.data, resolution, request.channels, fit=request.fit, background=request.background)
    if not 0 <= request.start < len(source):
        raise ArgumentError("--start", request.start, f"must be 0 to {len(source) - 1}")
    name = source.path.resolve().name if source.path is not None and source.path.is_dir() else source.name
    out = Path(request.out or f"{name}-{resolution}px.png").expanduser()
    check_picture(out)
    for line in source.remarks():
        say(line, error=True)
    order = np.arange(len(source)) if request.seed is None else Sampler(len(source), request.seed).order(0)
    chosen = order[request.start : request.start + request.n]
    images = np.stack([source.read(int(index), resolution) for index in chosen])
    labels = None
    if source.labels is not None:
        numbers = source.labels[chosen].tolist()
        labels = [source.classes[number] if number < len(source.classes) else str(number) for number in numbers]
    with writing(out):
        save_sheet(images, out, labels=labels)
    say(f"{len(chosen)} of {len(source):,} images, {resolution} px: {out}")
    return 0


def _shown_resolution(request: Show) -> int:
    if request.resolution is not None:
        return request.resolution
    from fastgan.data.prepared.manifest import is_prepared, read_manifest

    path = Path(os.path.expanduser(request.data.removeprefix("prepared:")))
    if not is_prepared(path):
        return 64
    return max(r for r in read_manifest(path, "DATA").resolutions if r <= 128)
