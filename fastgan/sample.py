"""Draw images from a trained generator: `fastgan sample RUN`, or `fastgan.load("RUN").sample(16, seed=0)`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

if __name__ == "__main__" and sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # see train.py

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastgan.commands import command
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor, nn


class TrainedGenerator:
    """The averaged generator of a run, in evaluation mode.

    Attributes:
        module: the network, latent [N, latent] (and labels int64 [N]) -> images [N, C, R, R].
        meta: what the checkpoint says of itself: variant, networks, images seen.
    """

    def __init__(self, module: nn.Module, meta: dict[str, Any]) -> None:
        self.module = module
        self.meta = meta

    @property
    def num_classes(self) -> int:
        return int(self.meta["networks"]["num_classes"])

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """`n` images, float32 [n, C, R, R] in [-1, 1]; sample i depends on (seed, i) alone.

        Raises:
            ValueError: `n` is below 1 or `seed` below 0.
        """
        from fastgan.training.trainer import sample_images

        if n < 1:
            raise ValueError(f"n: was {n}; it may be 1 or more")
        if seed < 0:
            raise ValueError(f"seed: was {seed}; it may be 0 or more")
        return sample_images(self.module, n, seed, self.meta["networks"])

    def interpolate(self, rows: int, columns: int, seed: int = 0) -> Tensor:
        """`rows` walks of `columns` images each between two random latents, float32 [rows * columns, C, R, R].

        The walk is along the great circle, on which Gaussian latents of high dimension lie (White 2016).
        """
        import torch

        from fastgan import noise
        from fastgan.training.trainer import generate

        device = next(self.module.parameters()).device
        latent: int = self.module.latent  # type: ignore[assignment]
        ends = noise.normal(seed, "sample", torch.arange(2 * rows, device=device), latent)
        start, end = ends[:rows, None], ends[rows:, None]
        unit = torch.nn.functional.normalize
        angle = torch.acos((unit(start, dim=-1) * unit(end, dim=-1)).sum(-1, keepdim=True).clamp(-1, 1))
        t = torch.linspace(0, 1, columns, device=device)[None, :, None]
        walk = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
        labels = None
        if self.num_classes:
            labels = (torch.arange(rows, device=device) % self.num_classes).repeat_interleave(columns)
        return generate(self.module, walk.flatten(0, 1), labels, self.meta["networks"]["resolution"])


def load(path: str | Path, device: str = "cpu") -> TrainedGenerator:
    """The averaged generator of a run's newest checkpoint, or of one checkpoint folder.

    Raises:
        ArgumentError (a ValueError): there is no checkpoint, or it is damaged.
    """
    from fastgan import checkpoint, models
    from fastgan.models.pggan import Progressive

    stored = checkpoint.read(Path(path), "RUN")
    generator, _ = models.build(**stored.meta["networks"])
    generator.load_state_dict(stored.generator())
    if isinstance(generator, Progressive):
        generator.set_alpha(generator.alpha.item())
    return TrainedGenerator(generator.to(device).eval().requires_grad_(False), stored.meta)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained generator into one PNG."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory, or one checkpoint in it."""
    n: int = 64
    """Number of images."""
    seed: int = 0
    """Of the latents; sample i depends on (seed, i) alone."""
    interpolate: bool = False
    """Each row walks between two latents; rows are filled, so that there may be a few images more."""
    out: str | None = None
    """File to write; None: RUN/sample-seed0.png and the like."""
    device: str = "cpu"
    """cpu or cuda."""


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(Sample, args=argv, prog="fastgan sample")
    if asked.n < 1:
        raise ArgumentError("--n", asked.n, "it may be 1 or more")
    if asked.seed < 0:
        raise ArgumentError("--seed", asked.seed, "it may be 0 or more")
    if asked.device not in ("cpu", "cuda"):
        raise ArgumentError("--device", asked.device, "it may be cpu or cuda")
    import torch

    from fastgan.training.log import save_grid

    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device", asked.device, "it may be cpu: torch sees no GPU here")
    trained = load(asked.run, asked.device)
    kind = "interpolation" if asked.interpolate else "sample"
    run = Path(asked.run)
    folder = next((p for p in (run, run.parent.parent) if (p / "config.yaml").is_file()), run)
    out = Path(asked.out) if asked.out else folder / f"{kind}-seed{asked.seed}.png"
    if out.suffix.lower() != ".png":
        raise ArgumentError("--out", str(out), "it may be a file that ends in .png")
    if asked.interpolate:
        columns = max(2, math.ceil(asked.n**0.5))  # whole walks: --n is rounded up to fill the last row
        images = trained.interpolate(math.ceil(asked.n / columns), columns, asked.seed)
    else:
        columns = None
        images = trained.sample(asked.n, asked.seed)
    try:
        save_grid(images, out, columns=columns)
    except OSError as error:
        raise ArgumentError("--out", str(out), f"it may be a file that can be written ({error.strerror})") from None
    print(
        f"{len(images)} images of {images.shape[-1]} px, {trained.meta['variant']} at "
        f"{trained.meta['images'] / 1000:g} kimg: {out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
