"""Draw images from a trained generator: `fastgan sample RUN` (in Python: `fastgan.load("RUN").sample(16)`)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastgan.cli.main import check_device, check_picture, command, writing
from fastgan.cli.output import say
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.generator import TrainedGenerator


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained generator into one PNG, or a video."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, one checkpoint in it, an exported file, or a name: avatars, fashion-mnist (they come with
    fastgan)."""
    n: int | None = None
    """Number of images; None: 64, in a video 16."""
    seed: int = 0
    """Seed of the latents; sample i depends only on (seed, i)."""
    interpolate: bool = False
    """Each row interpolates between two latents. --n is rounded up to fill the last row."""
    truncation: float = 1.0
    """Factor of the latents, at most 1: smaller gives images that vary less (not for pggan, which normalizes them)."""
    video: str | None = None
    """Write this .mp4 instead: a smooth walk through the latents that ends where it began."""
    timelapse: str | None = None
    """Write this .mp4 instead: the grids in the run's samples/, from the first to the last."""
    seconds: float = 8.0
    """Length of a video."""
    out: str | None = None
    """PNG file to write; None: sample-seed0.png or interpolation-seed0.png in RUN, beside an exported file, or for a
    generator that comes with fastgan NAME-sample-seed0.png here."""
    device: str = "cpu"
    """cpu, cuda or mps."""


@contextlib.contextmanager
def _enough_memory(n: int, image_bytes: int) -> Iterator[None]:
    """Raises ArgumentError of --n if `n` images of at least `image_bytes` each do not fit in memory."""
    try:
        # All memory, not the free part: the system can free what it uses for caches, but not say how much.
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // image_bytes
    except (ValueError, OSError, AttributeError):
        most = n
    if n > most:
        raise ArgumentError("--n", n, f"must be at most {most}; all images are in this machine's memory at once")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # torch's CPU allocator raises RuntimeError
            raise ArgumentError("--n", n, "must be smaller; there is too little memory for all images") from None
        raise


def folder_for(run: str) -> Path:
    """Folder for pictures of the generator that RUN names: the run's, an exported file's, or this one for a name."""
    path = Path(run)
    folder = path if path.is_dir() else path.parent
    return next((p for p in (folder, folder.parent.parent) if (p / "config.yaml").is_file()), folder)


def prefix_for(run: str) -> str:
    """Start of the names of pictures: `NAME-` for a generator that comes with fastgan, whose folder is any folder."""
    from fastgan import trained

    name = trained.name_of(run)
    return "" if name is None else f"{name}-"


@command
def main(argv: list[str]) -> int:
    args = tyro.cli(Sample, args=argv, prog="fastgan sample")
    if args.n is not None and args.n < 1:
        raise ArgumentError("--n", args.n, "must be at least 1")
    if args.seed < 0:
        raise ArgumentError("--seed", args.seed, "must be at least 0")
    if not 0 < args.truncation <= 1:
        raise ArgumentError("--truncation", args.truncation, "must be above 0 and at most 1")
    check_device(args.device)
    _check_video(args)
    if args.timelapse is not None:
        from fastgan.video import save_timelapse

        count = save_timelapse(Path(args.run), Path(args.timelapse), args.seconds)
        say(f"{count} grids of {args.run}: {args.timelapse}")
        return 0
    from fastgan.generator import load

    trained = load(args.run, args.device)
    if args.truncation < 1 and not trained.truncates:
        raise ArgumentError("--truncation", args.truncation, "must be 1 for pggan, which normalizes its latents")
    return _picture(args, trained) if args.video is None else _walk(args, trained)


def _check_video(args: Sample) -> None:
    given = [name for name in ("video", "timelapse", "out") if getattr(args, name) is not None]
    if len(given) > 1:
        flag, other = given[1], given[0]
        raise ArgumentError(f"--{flag}", getattr(args, flag), f"it is not needed with --{other}: remove it")
    for flag in ("video", "timelapse"):
        path = getattr(args, flag)
        if path is not None and Path(path).suffix.lower() != ".mp4":
            raise ArgumentError(f"--{flag}", path, "must be a file that ends in .mp4")
        if path is not None and args.interpolate:
            raise ArgumentError("--interpolate", True, f"it is not needed with --{flag}: remove it")
    if not 0.1 <= args.seconds <= 3600:
        raise ArgumentError("--seconds", args.seconds, "must be 0.1 to 3600")


def _walk(args: Sample, trained: TrainedGenerator) -> int:
    from fastgan.video import save_walk

    out, n = Path(str(args.video)), args.n or 16
    networks = trained.meta["networks"]
    with _enough_memory(n, 8 * (networks["channels"] * networks["resolution"] ** 2 + networks["latent"])):
        frames = save_walk(trained, out, n, args.seconds, args.seed, args.truncation)
    say(f"{frames} frames of {n} images, {trained}: {out}")
    return 0


def _picture(args: Sample, trained: TrainedGenerator) -> int:
    from fastgan.training.observability.metrics_log import save_grid

    n = args.n or 64
    kind = "interpolation" if args.interpolate else "sample"
    out = Path(args.out) if args.out else folder_for(args.run) / f"{prefix_for(args.run)}{kind}-seed{args.seed}.png"
    check_picture(out)
    networks = trained.meta["networks"]
    image_bytes = 4 * (networks["channels"] * networks["resolution"] ** 2 + networks["latent"])
    with _enough_memory(n, 2 * image_bytes):
        columns = None
        if args.interpolate:
            columns = max(2, math.ceil(n**0.5))
            images = trained.interpolate(math.ceil(n / columns), columns, args.seed, args.truncation)
        else:
            images = trained.sample(n, args.seed, args.truncation)
        names = trained.class_names
        # Sample i has class i mod the number of classes, and a row of an interpolation one class.
        labels = [names[(i if columns is None else i // columns) % len(names)] for i in range(len(images)) if names]
        with writing(out):
            save_grid(images, out, columns=columns, labels=labels)
    say(f"{len(images)} images of {images.shape[-1]} px, {trained}: {out}")
    return 0
