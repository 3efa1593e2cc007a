"""Bring images into the form that training reads fastest: `fastgan prepare SRC DST`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastgan.cli.main import command
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.data.prepared import Manifest


_KINDS = ("avif", "bmp", "gif", "jpeg", "jpg", "jxl", "none", "png", "tif", "tiff", "webp")


@dataclass(frozen=True)
class Prepare:
    """Bring images into the form that training reads fastest: every resolution from 4 px to the target, once.

    Stopped at any moment, the same command goes on where it was. docs/data.md describes what is written.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder of images, a zip, tar files (one, a folder, a pattern), a CIFAR-10, MNIST or CelebA root, another
    prepared set, digits; also folder:PATH, zip:PATH, tar:PATH, cifar10:ROOT, mnist:ROOT, celeba:ROOT, prepared:PATH."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """A new or empty folder, or one that the same command began."""
    resolution: int | None = None
    """The target, px, a power of two; None: the largest up to 1024 that 95% of the images have."""
    channels: int | None = None
    """1 (gray) or 3 (color); None: 1 if all images are gray."""
    cache_to: int = 128
    """Resolutions up to this are stored as decoded arrays, those above as image files; 0: none."""
    quality: int = 95
    """Of JPEG, 1 to 100."""
    lossless: Literal["png", "webp"] | None = None
    """Store PNG (also for a bare --lossless) or lossless WebP instead of JPEG."""
    fit: bool = False
    """The whole image, centered on black, instead of its center square."""
    min_size: int | None = None
    """Skip images whose shorter side (with --fit: longer) has fewer pixels; None: the target; published sets: 1."""
    per_shard: int = 1024
    """Originals that share a file: the unit of work, and of what a kill may cost."""
    strict: bool = False
    """Stop if a file cannot be used, instead of skipping it."""
    workers: int = 0
    """Processes; 0: one per core."""


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(Prepare, args=_lossless(argv), prog="fastgan prepare")
    from fastgan.data.preparation.prepare import Settings, prepare

    settings = Settings(**{one.name: getattr(asked, one.name) for one in fields(Settings)})
    try:
        made = prepare(
            asked.src,
            asked.dst,
            settings,
            strict=asked.strict,
            workers=asked.workers,
            progress=True,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        print("fastgan: interrupted; the same command goes on", file=sys.stderr, flush=True)
        return 130
    print(summary(made))
    return 0


def _lossless(argv: list[str]) -> list[str]:
    """`--lossless` alone means png.

    Raises:
        ArgumentError: what follows it is the name of another kind of file, which would pass for SRC or DST.
    """
    out = []
    for at, argument in enumerate(argv):
        out.append(argument)
        following = argv[at + 1] if at + 1 < len(argv) else ""
        if argument == "--lossless" and following not in ("png", "webp", "None"):
            if following.lower() in _KINDS and not Path(following).exists():
                raise ArgumentError("--lossless", following, "must be png or webp")
            out.append("png")
    return out


def summary(made: Manifest) -> str:
    """What was made, in a line or two."""
    from fastgan.data.prepared import SKIPPED
    from fastgan.utils.text import readable_size

    size = readable_size(sum(file.bytes for file in made.files.values()))
    what = f"{made.count:,} images of {made.resolution} px, {'gray' if made.channels == 1 else 'color'}"
    if made.num_classes:
        what += f", {made.num_classes:,} classes"
    lines = [f"{made.path}: {what}, {size}"]
    if made.skipped:
        lines.append(f"skipped: {made.skipped:,} files, named with the reason in {Path(made.path) / SKIPPED}")
    return "\n".join(lines)
