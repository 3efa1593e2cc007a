"""Draw images from a trained generator: `fastgan sample RUN` (in Python: `fastgan.load("RUN").sample(16)`)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastgan.cli.main import check_device, check_picture, command, writing
from fastgan.errors import ArgumentError


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained generator into one PNG."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory, one checkpoint in it, or an exported file."""
    n: int = 64
    """Number of images."""
    seed: int = 0
    """Seed of the latents; sample i depends only on (seed, i)."""
    interpolate: bool = False
    """Each row interpolates between two latents. --n is rounded up to fill the last row."""
    truncation: float = 1.0
    """Factor of the latents, at most 1: smaller gives images that vary less (not for pggan, which normalizes them)."""
    out: str | None = None
    """PNG file to write; None: sample-seed0.png or interpolation-seed0.png in RUN, or beside an exported file."""
    device: str = "cpu"
    """cpu or cuda."""


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


@command
def main(argv: list[str]) -> int:
    args = tyro.cli(Sample, args=argv, prog="fastgan sample")
    if args.n < 1:
        raise ArgumentError("--n", args.n, "must be at least 1")
    if args.seed < 0:
        raise ArgumentError("--seed", args.seed, "must be at least 0")
    if not 0 < args.truncation <= 1:
        raise ArgumentError("--truncation", args.truncation, "must be above 0 and at most 1")
    check_device(args.device)
    from fastgan.generator import load
    from fastgan.training.observability.metrics_log import save_grid

    trained = load(args.run, args.device)
    if args.truncation < 1 and not trained.truncates:
        raise ArgumentError("--truncation", args.truncation, "must be 1 for pggan, which normalizes its latents")
    run = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    folder = next((p for p in (run, run.parent.parent) if (p / "config.yaml").is_file()), run)
    kind = "interpolation" if args.interpolate else "sample"
    out = Path(args.out) if args.out else folder / f"{kind}-seed{args.seed}.png"
    check_picture(out)
    networks = trained.meta["networks"]
    image_bytes = 4 * (networks["channels"] * networks["resolution"] ** 2 + networks["latent"])
    with _enough_memory(args.n, 2 * image_bytes):
        columns = None
        if args.interpolate:
            columns = max(2, math.ceil(args.n**0.5))
            images = trained.interpolate(math.ceil(args.n / columns), columns, args.seed, args.truncation)
        else:
            images = trained.sample(args.n, args.seed, args.truncation)
        with writing(out):
            save_grid(images, out, columns=columns)
    print(f"{len(images)} images of {images.shape[-1]} px, {trained}: {out}")
    return 0
