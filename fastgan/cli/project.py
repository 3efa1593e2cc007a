"""Find the latent whose image is nearest to a picture: `fastgan project RUN IMAGE`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastgan.cli.main import check_device, command
from fastgan.cli.output import say
from fastgan.cli.sample import folder_for, prefix_for
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.generator import TrainedGenerator
    from fastgan.projection import Projection


@dataclass(frozen=True)
class Project:
    """Find the latent whose image is nearest to a picture.

    Writes the picture beside its projection, a grid of the projection's neighbors, and the latent.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, one checkpoint in it, a .safetensors export, or a name: avatars, fashion-mnist (they come with
    fastgan)."""
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Picture of any size."""
    out: str | None = None
    """Folder for STEM-projection.png, STEM-neighbors.png and STEM-projection.safetensors, STEM from the name of the
    picture; None: RUN, beside an exported file, or for a generator that comes with fastgan this one."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How the picture becomes a square."""
    background: str = "white"
    """Color of padding and behind transparent parts."""
    label: int | None = None
    """Class of the image; None: all are tried."""
    features: Literal["efficientnet-lite0", "none"] | None = None
    """Network whose features are compared beside pixels; None: efficientnet-lite0 where it is installed and images have
    at least 32 px."""
    steps: int = 200
    """Steps of the optimizer, after half as many for each start; 0: take the nearest of 512 latents."""
    starts: int = 4
    """Latents that are followed at first, the nearest of 512."""
    seed: int = 0
    """Seed of the latents."""
    device: str = "cpu"
    """cpu, cuda or mps."""


def _validate(args: Project) -> None:
    if not 0 <= args.steps <= 100_000:
        raise ArgumentError("--steps", args.steps, "must be 0 to 100,000")
    if not 1 <= args.starts <= 64:
        raise ArgumentError("--starts", args.starts, "must be 1 to 64")
    if args.seed < 0:
        raise ArgumentError("--seed", args.seed, "must be at least 0")
    check_device(args.device)


@command
def main(argv: list[str]) -> int:
    args = tyro.cli(Project, args=argv, prog="fastgan project")
    _validate(args)
    from fastgan import projection
    from fastgan.generator import device_of, load

    trained = load(args.run, args.device)
    networks, classes = trained.meta["networks"], trained.num_classes
    if not any(True for _ in trained.module.parameters()):
        raise ArgumentError("RUN", args.run, "must be a run or a .safetensors export; this file gives no gradients")
    if args.label is not None and not 0 <= args.label < classes:
        problem = f"must be 0 to {classes - 1}" if classes else "is not needed: this generator has no classes"
        raise ArgumentError("--label", args.label, problem)
    target = projection.read_picture(
        Path(args.image), networks["resolution"], networks["channels"], args.fit, args.background
    )
    features = projection.feature_network(networks["resolution"], device_of(trained.module), args.features)
    found = projection.project(
        trained, target, seed=args.seed, steps=args.steps, starts=args.starts, label=args.label, features=features
    )
    folder = folder_for(args.run) if args.out is None else Path(args.out)
    return _write(args, trained, found, folder, features is not None)


def _write(args: Project, trained: TrainedGenerator, found: Projection, folder: Path, with_features: bool) -> int:
    import torch
    from safetensors.torch import save

    from fastgan.projection import neighbors
    from fastgan.training.observability.metrics_log import save_grid
    from fastgan.utils.files import write_atomic

    stem = f"{prefix_for(args.run)}{Path(args.image).stem}"
    tensors = {"latent": found.latent} | ({} if found.label is None else {"label": found.label})
    facts = {"generator": str(trained), "picture": Path(args.image).name, "error": found.error, "seed": args.seed}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = save({name: x.contiguous() for name, x in tensors.items()}, {"fastgan": json.dumps(facts)})
        write_atomic(folder / f"{stem}-projection.safetensors", content)
        pair = torch.cat([found.target, found.image])
        save_grid(pair, folder / f"{stem}-projection.png", columns=2)
        save_grid(neighbors(trained, found, seed=args.seed), folder / f"{stem}-neighbors.png", columns=8)
    except OSError as error:
        problem = f"must be a folder that can be written; {error.strerror}"
        raise ArgumentError("--out", str(folder), problem) from None
    by = "pixels and features" if with_features else "pixels"
    of = f", class {trained.class_names[int(found.label)]}" if found.label is not None else ""
    say(f"{trained}{of}: nearest by {by}, pixels differ by {found.error:.1f} of 255 levels (root mean square)")
    for name in ("projection.png", "neighbors.png", "projection.safetensors"):
        say(folder / f"{stem}-{name}")
    return 0
