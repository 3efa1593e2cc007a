"""`fastgan prepare SRC DST`: convert images to a prepared set, which training reads fastest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastgan.cli.main import command
from fastgan.cli.output import say
from fastgan.data.preparation.settings import Settings
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.data.prepared.manifest import Manifest

_FORMATS = ("avif", "bmp", "gif", "jpeg", "jpg", "jxl", "none", "png", "tif", "tiff", "webp")


@dataclass(frozen=True)
class Prepare:
    """Convert images to a prepared set, which training reads fastest: every resolution from 4 px to the target.

    After an interruption, the same command resumes. docs/data.md describes the files of a set.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder of images, a zip, tar files (one, a folder, a pattern), a CIFAR-10, MNIST or CelebA root, another
    prepared set, or digits; also folder:PATH, zip:PATH, tar:PATH, cifar10:ROOT, mnist:ROOT, celeba:ROOT,
    prepared:PATH."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """A new or empty folder, or one that the same command started."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    strict: bool = False
    """Refuse files that cannot be used, instead of skipping them."""
    workers: int = 0
    """Number of processes; 0: one per core."""


@command
def main(argv: list[str]) -> int:
    request = tyro.cli(Prepare, args=_lossless(argv), prog="fastgan prepare")
    from fastgan.data.preparation.prepare import prepare

    try:
        manifest = prepare(
            request.src,
            request.dst,
            request.settings,
            strict=request.strict,
            workers=request.workers,
            progress=True,
            report=lambda line: say(line, error=True),
        )
    except KeyboardInterrupt:
        say("fastgan: interrupted; run the same command again to continue", error=True)
        return 130
    say(summary(manifest))
    return 0


def _lossless(argv: list[str]) -> list[str]:
    """`--lossless` alone means png.

    Raises:
        ArgumentError: another image format follows it, which would be taken for SRC or DST.
    """
    out = []
    for at, argument in enumerate(argv):
        out.append(argument)
        following = argv[at + 1] if at + 1 < len(argv) else ""
        if argument == "--lossless" and following not in ("png", "webp", "None"):
            if following.lower() in _FORMATS and not Path(following).exists():
                raise ArgumentError("--lossless", following, "must be png or webp")
            out.append("png")
    return out


def summary(manifest: Manifest) -> str:
    """Describe a prepared set in a line or two."""
    from fastgan.data.prepared.manifest import SKIPPED
    from fastgan.utils.text import readable_size

    size = readable_size(sum(file.bytes for file in manifest.files.values()))
    what = f"{manifest.count:,} images of {manifest.resolution} px, {'gray' if manifest.channels == 1 else 'color'}"
    if manifest.num_classes:
        what += f", {manifest.num_classes:,} classes"
    lines = [f"{manifest.path}: {what}, {size}"]
    if manifest.skipped:
        lines.append(f"skipped: {manifest.skipped:,} files, listed with the reason in {manifest.path / SKIPPED}")
    return "\n".join(lines)
