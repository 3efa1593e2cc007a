"""What a prepared set holds: `fastgan data info DST`, `fastgan data verify DST`, `fastgan data show DST`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastgan.cli.main import check_picture, command, writing
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.data.prepared import Manifest


@dataclass(frozen=True)
class Info:
    """Print what a prepared set holds."""

    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Its folder."""


@dataclass(frozen=True)
class Verify:
    """Read every file and compare it with its hash; name those that are missing, cut, changed or foreign.

    Exits with 1 if there are any.
    """

    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Its folder."""
    workers: int = 0
    """Threads; 0: one per core."""


@dataclass(frozen=True)
class Show:
    """Write some of the images into one PNG."""

    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The set's folder."""
    n: int = 64
    """Number of images."""
    resolution: int | None = None
    """px; None: the largest up to 128."""
    start: int = 0
    """The first of them."""
    seed: int | None = None
    """Take them from a shuffle instead of the set's order."""
    out: str | None = None
    """File to write; None: NAME-128px.png and the like, here."""


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(
        Annotated[Info, tyro.conf.subcommand("info")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Show, tyro.conf.subcommand("show")],
        args=argv,
        prog="fastgan data",
        description=__doc__,
    )
    from fastgan.data.prepared import read_manifest

    manifest = read_manifest(Path(asked.dst).expanduser(), "DST")
    if isinstance(asked, Info):
        print(table(manifest))
        return 0
    return _verify(manifest, asked.workers) if isinstance(asked, Verify) else _show(manifest, asked)


def table(manifest: Manifest) -> str:
    """A prepared set, in lines."""
    from fastgan.data.prepared import SKIPPED
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
        kept = "arrays" if r in manifest.cached else manifest.encoding
        held = sum(manifest.files[name].bytes for name in manifest.files_of(r))
        lines.append(f"  {r:>5}  {kept:10} {readable_size(held):>10} {readable_size(held / manifest.count):>12}")
    return "\n".join(lines)


def _verify(manifest: Manifest, workers: int) -> int:
    from tqdm import tqdm

    from fastgan.data.preparation.originals import printable
    from fastgan.data.preparation.verification import verify
    from fastgan.utils.text import readable_size

    if workers < 0:
        raise ArgumentError("--workers", workers, "must be at least 0 (one per core)")
    found = 0
    for fault in verify(manifest, workers=workers, progress=True):
        found += 1
        tqdm.write(f"{manifest.path / printable(fault.name)} {fault.what}")
    if found:
        files = "1 file is" if found == 1 else f"{found:,} files are"
        print(f"fastgan: {files} wrong; copy the set anew, or delete it and prepare it anew", file=sys.stderr)
        return 1
    size = readable_size(sum(file.bytes for file in manifest.files.values()))
    print(f"{manifest.path}: all {len(manifest.files):,} files, {size}, are as they were written")
    return 0


def _show(manifest: Manifest, asked: Show) -> int:
    import numpy as np

    from fastgan.data.images import save_sheet
    from fastgan.data.loading.sampler import Sampler
    from fastgan.data.prepared import Level

    if asked.n < 1:
        raise ArgumentError("--n", asked.n, "must be at least 1")
    if not 0 <= asked.start < manifest.count:
        raise ArgumentError("--start", asked.start, f"must be 0 to {manifest.count - 1}")
    resolution = asked.resolution
    if resolution is None:
        resolution = max(r for r in manifest.resolutions if r <= 128)
    manifest.files_of(resolution)  # refuses what it does not have
    out = Path(asked.out or f"{manifest.path.resolve().name}-{resolution}px.png").expanduser()
    check_picture(out)
    order = np.arange(manifest.count) if asked.seed is None else Sampler(manifest.count, asked.seed).order(0)
    chosen = order[asked.start : asked.start + asked.n]
    level = Level(manifest, resolution, "DST")
    images = np.stack([level.pixels(int(index)) for index in chosen])
    with writing(out):
        save_sheet(images, out, size=64)
    print(f"{len(chosen)} of {manifest.count:,} images, {resolution} px: {out}")
    return 0
