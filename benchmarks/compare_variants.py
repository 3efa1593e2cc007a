"""The eight variants on handwritten digits of 32 px, with generators of one size and one budget of images.

    python benchmarks/compare_variants.py [--variants wgan-gp pggan] [--seeds 3] [--kimg 150]

For each variant and seed: quality of 10,000 images of the averaged generator (Frechet distance, precision, recall,
density, coverage, all of digits features; modes and KL), images per second of training, and at 20 points of it the
Frechet distance of 2,000 images and the norm of the gradient of the generator's loss that reaches an image from the
discriminator. Sample grids and curves go to --figures as PNG, and a table is printed.

A finished cell is kept in the file --cells; stopped and started again, the command goes on where it was. --table makes
the table and the curves of what is done. Speeds are those of the machine as busy as it was.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastgan
from fastgan import checkpoint, models, noise
from fastgan.config import Config, merge, read_yaml
from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation, cache_folder
from fastgan.models.pggan import Progressive
from fastgan.training.build import build_step
from fastgan.training.evaluating import drawer
from fastgan.training.log import save_grid
from fastgan.variants import VARIANTS

sys.path.insert(0, str(Path(__file__).parent))
from cells import ROOT, Cells, Stopped, arguments, name_of, spread, start, table, train

RESOLUTION = 32
POINTS = 20
CURVE_IMAGES = 2000
IMAGES = 10_000


def gradient_norm(stored: checkpoint.Checkpoint, config: Config) -> float:
    """Mean norm of d loss / d image over 256 generated images, each with its own loss, at a checkpoint's weights.

    Both networks are in training mode, as where the generator learns from it.
    """
    networks, state = stored.meta["networks"], stored.training()
    generator, discriminator = models.build(**networks)
    for module, name in ((generator, "generator"), (discriminator, "discriminator")):
        module.load_state_dict(state[name])
        module.train().requires_grad_(False)
        if isinstance(module, Progressive):
            module.set_alpha(module.alpha.item())
    positions = torch.arange(256)
    latent = noise.normal(0, "gradient", positions, generator.latent)  # type: ignore[arg-type]
    images = generator(latent).requires_grad_()
    loss = build_step(config, generator, discriminator, 0).loss.generator(discriminator(images))
    (gradient,) = torch.autograd.grad(len(images) * loss, images)
    return gradient.flatten(1).norm(dim=1).mean().item()


def seconds_at(run: Path) -> list[tuple[int, float]]:
    """(images, seconds of training until then) of each logged interval."""
    found, images, seconds = [], 0, 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "images_per_second" in row:
            seconds += (row["images"] - images) / row["images_per_second"]
            images = row["images"]
            found.append((images, seconds))
    return found


def compute(variant: str, seed: int, kimg: float, runs: Path, figures: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Train one cell, or go on with it, and measure it."""
    run = runs / f"digits-{variant}-seed{seed}-{kimg:g}kimg"
    asked = f"--data digits --batch 64 --seed {seed} --keep 1000 --checkpoint-kimg {kimg / POINTS:g}"
    train(variant, RESOLUTION, run, kimg, [*asked.split(), "--sample-kimg", f"{kimg:g}", *flags])
    values = read_yaml(run / "config.yaml", "RUN")
    values = {key: value for key, value in values.items() if key not in ("variant", "preset")}
    config = merge(Config(), values, str(run / "config.yaml"))
    source, extractor = open_source("digits", RESOLUTION), open_extractor("digits", 1)

    def evaluate(path: Path, metrics: list[str], n: int) -> dict[str, float]:
        trained = fastgan.load(path)
        evaluation = Evaluation(metrics, extractor, n, seed, cache_folder())
        draw = drawer(trained.module, trained.meta["networks"], source, seed)
        found = evaluation(draw, source, trained.meta["networks"]["resolution"], print)
        assert found is not None
        return found["metrics"]

    times, curve = seconds_at(run), []
    for path in checkpoint.existing(run):
        stored = checkpoint.read(path, "RUN")
        images = stored.meta["images"]
        point = {"kimg": images / 1000, "gradient": gradient_norm(stored, config)}
        point["seconds"] = min((second for at, second in times if at >= images), default=times[-1][1])
        # A generator that has yet to grow is compared with real images of its own size: no number to put in a row.
        if stored.meta["resolution"] == RESOLUTION:
            point["frechet_distance"] = evaluate(path, ["fid"], CURVE_IMAGES)["frechet_distance"]
        curve.append(point)
    trained = fastgan.load(run)
    figures.mkdir(parents=True, exist_ok=True)
    save_grid(trained.sample(64, seed), figures / f"{variant}-seed{seed}.png")
    return {
        **evaluate(run, ["fid", "prdc", "modes"], IMAGES),
        "kimg": kimg,
        "images_per_second": times[-1][0] / times[-1][1],
        "generator_parameters": sum(p.numel() for p in trained.module.parameters()),
        "curve": curve,
    }


def report(cells: Cells, kimg: float) -> str:
    """The table of what is done. Good enough, for its last column, is twice the best variant's final distance."""
    all_cells = {variant: found for variant in VARIANTS if (found := cells.of("digits", variant, kimg))}
    if not all_cells:
        return "no cell is done"
    best = min(sum(cell["frechet_distance"] for cell in found) / len(found) for found in all_cells.values())
    rows = []
    for variant in VARIANTS:
        found = all_cells.get(variant, [])
        if not found:
            rows.append([f"`{variant}`", "0", *["-"] * 10])
            continue
        names = {"frechet_distance": ".0f", "precision": ".2f", "recall": ".2f", "density": ".2f", "coverage": ".2f"}
        names |= {"modes": ".0f", "kl": ".3f", "images_per_second": ".0f"}
        values = [spread([cell[name] for cell in found], form) for name, form in names.items()]
        reached = []
        for cell in found:
            good = [point["seconds"] for point in cell["curve"] if point.get("frechet_distance", 1e9) <= 2 * best]
            reached += good[:1]
        seconds = spread(reached, ".0f") if len(reached) == len(found) else f"{len(reached)} of {len(found)} reach it"
        rows.append([f"`{variant}`", str(len(found)), *values, seconds, f"{found[0]['generator_parameters']:,}"])
    head = "variant|seeds|Frechet distance (digits features)|precision|recall|density|coverage|modes of 10|KL|images/s"
    return table([*head.split("|"), f"seconds to a distance of {2 * best:.0f}", "parameters of G"], rows)


def curves(cells: Cells, kimg: float, figures: Path) -> list[Path]:
    """Frechet distance and gradient norm over training, each seed a line, as PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    written = []
    names = {"frechet_distance": "Frechet distance (digits features)", "gradient": "norm of the gradient reaching G"}
    for key, label in names.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for i, variant in enumerate(VARIANTS):
            for number, cell in enumerate(cells.of("digits", variant, kimg)):
                points = [(point["kimg"], point[key]) for point in cell["curve"] if key in point]
                if not points:
                    continue
                # A gradient may vanish to zero, which no logarithm shows.
                x, y = zip(*[(at, max(value, 1e-12)) for at, value in points], strict=True)
                axes.plot(x, y, color=colormaps["tab10"](i), label=None if number else variant, linewidth=1.3)
        axes.set(xlabel="kimg", ylabel=label, yscale="log")
        if axes.lines:
            axes.legend(ncols=2, fontsize=8)
        figures.mkdir(parents=True, exist_ok=True)
        written.append(figures / f"curves-{key.replace('_', '-')}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def main(argv: list[str]) -> int:
    parser = arguments(__doc__, "variants")
    parser.add_argument("--kimg", type=float, default=150.0)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "variants", help="where grids and curves go")
    asked = parser.parse_args(argv)
    cells, flags = start(asked)
    order = [(seed, variant) for seed in range(asked.seeds) for variant in asked.variants]
    for seed, variant in [] if asked.table else order:
        work = functools.partial(compute, variant, seed, asked.kimg, asked.runs, asked.figures, flags)
        name = name_of("digits", variant, seed, asked.kimg)
        try:
            if cells.compute(name, work) is not None:
                print(f"{name}: done", flush=True)
        except Stopped:
            break
    print(report(cells, asked.kimg))
    if cells.done:
        print(f"curves: {', '.join(str(path) for path in curves(cells, asked.kimg, asked.figures))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
