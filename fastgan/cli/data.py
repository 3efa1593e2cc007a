"""Print, verify or show the contents of a prepared set."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastgan.cli.main import check_picture, command, writing
from fastgan.errors import ArgumentError

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
    """Write some of the images to one PNG."""

    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder of the set."""
    n: int = 64
    """Number of images."""
    resolution: int | None = None
    """Resolution of the images, px; None: the largest up to 128."""
    start: int = 0
    """Index of the first image."""
    seed: int | None = None
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
    from fastgan.data.prepared.manifest import read_manifest

    manifest = read_manifest(Path(request.dst).expanduser(), "DST")
    if isinstance(request, Info):
        print(table(manifest))
        return 0
    return _verify(manifest, request.workers) if isinstance(request, Verify) else _show(manifest, request)


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
    lines = [str(manifest.path), *(f"  {name:12} {value}" for name, value in facts.items()), ""]
    lines.append(f"  {'px':>5}  {'stored as':10} {'on disk':>10} {'per image':>12}")
    for r in manifest.resolutions:
        stored_as = "arrays" if r in manifest.cached else manifest.encoding
        size = sum(manifest.files[name].bytes for name in manifest.files_of(r))
        lines.append(f"  {r:>5}  {stored_as:10} {readable_size(size):>10} {readable_size(size / manifest.count):>12}")
    return "\n".join(lines)


def _verify(manifest: Manifest, workers: int) -> int:
    from tqdm import tqdm

    from fastgan.data.preparation.collection import printable
    from fastgan.data.preparation.verification import verify
    from fastgan.utils.text import readable_size

    if workers < 0:
        raise ArgumentError("--workers", workers, "must be at least 0; 0 is one per core")
    faults = 0
    for fault in verify(manifest, workers=workers, progress=True):
        faults += 1
        tqdm.write(f"{manifest.path / printable(fault.name)} {fault.problem}")
    if faults:
        files = "1 file is" if faults == 1 else f"{faults:,} files are"
        print(f"fastgan: {files} wrong; copy the set again, or delete it and prepare it again", file=sys.stderr)
        return 1
    size = readable_size(sum(file.bytes for file in manifest.files.values()))
    print(f"{manifest.path}: all {len(manifest.files):,} files, {size}, are as they were written")
    return 0


def _show(manifest: Manifest, request: Show) -> int:
    import numpy as np

    from fastgan.data.loading.sampler import Sampler
    from fastgan.data.prepared.reader import Level
    from fastgan.data.sheets import save_sheet

    if request.n < 1:
        raise ArgumentError("--n", request.n, "must be at least 1")
    if not 0 <= request.start < manifest.count:
        raise ArgumentError("--start", request.start, f"must be 0 to {manifest.count - 1}")
    resolution = request.resolution
    if resolution is None:
        resolution = max(r for r in manifest.resolutions if r <= 128)
    manifest.files_of(resolution)  # refuses a resolution that the set does not have
    out = Path(request.out or f"{manifest.path.resolve().name}-{resolution}px.png").expanduser()
    check_picture(out)
    order = np.arange(manifest.count) if request.seed is None else Sampler(manifest.count, request.seed).order(0)
    chosen = order[request.start : request.start + request.n]
    level = Level(manifest, resolution, "DST")
    images = np.stack([level.pixels(int(index)) for index in chosen])
    with writing(out):
        save_sheet(images, out, size=64)
    print(f"{len(chosen)} of {manifest.count:,} images, {resolution} px: {out}")
    return 0
