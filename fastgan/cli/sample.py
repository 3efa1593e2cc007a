"""Draw images from a trained generator: `fastgan sample RUN`, or `fastgan.load("RUN").sample(16, seed=0)`."""

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
    """Of the latents; sample i depends on (seed, i) alone."""
    interpolate: bool = False
    """Each row walks between two latents; rows are filled, so that there may be a few images more."""
    truncation: float = 1.0
    """Factor of the latents, up to 1: smaller makes images that vary less (not for pggan, which normalizes them)."""
    out: str | None = None
    """File to write; None: RUN/sample-seed0.png and the like, beside an exported file."""
    device: str = "cpu"
    """cpu or cuda."""


@contextlib.contextmanager
def _fitting(n: int, each: int) -> Iterator[None]:
    """Around the making of `n` images of `each` bytes at least, all in memory at once: too many are --n's fault."""
    try:
        # Of all memory: the system gives back what it keeps of files, and how much it can is not known.
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // each
    except (ValueError, OSError, AttributeError):
        most = n
    if n > most:
        raise ArgumentError("--n", n, f"must be {most} or fewer: all are held in this machine's memory at once")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # torch's CPU allocator has no class of its own
            raise ArgumentError("--n", n, "must be less; there is too little memory for all at once") from None
        raise


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(Sample, args=argv, prog="fastgan sample")
    if asked.n < 1:
        raise ArgumentError("--n", asked.n, "must be at least 1")
    if asked.seed < 0:
        raise ArgumentError("--seed", asked.seed, "must be at least 0")
    if not 0 < asked.truncation <= 1:
        raise ArgumentError("--truncation", asked.truncation, "must be above 0 and up to 1")
    check_device(asked.device)
    from fastgan.generator import load
    from fastgan.training.observability.metrics_log import save_grid

    trained = load(asked.run, asked.device)
    kind = "interpolation" if asked.interpolate else "sample"
    if asked.truncation < 1 and not trained.truncates:
        raise ArgumentError("--truncation", asked.truncation, "must be 1 here; pggan normalizes its latents")
    run = Path(asked.run) if Path(asked.run).is_dir() else Path(asked.run).parent
    folder = next((p for p in (run, run.parent.parent) if (p / "config.yaml").is_file()), run)
    out = Path(asked.out) if asked.out else folder / f"{kind}-seed{asked.seed}.png"
    check_picture(out)
    networks = trained.meta["networks"]
    image = 4 * (networks["channels"] * networks["resolution"] ** 2 + networks["latent"])
    with _fitting(asked.n, 2 * image):
        if asked.interpolate:
            columns = max(2, math.ceil(asked.n**0.5))  # whole walks: --n is rounded up to fill the last row
            images = trained.interpolate(math.ceil(asked.n / columns), columns, asked.seed, asked.truncation)
        else:
            columns = None
            images = trained.sample(asked.n, asked.seed, asked.truncation)
        with writing(out):
            save_grid(images, out, columns=columns)
    print(f"{len(images)} images of {images.shape[-1]} px, {trained}: {out}")
    return 0
