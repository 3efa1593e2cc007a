"""The eight variants on handwritten digits of 32 px, with generators of one size and one budget of images.

    python -m benchmarks.studies.compare_variants --speed --threads 1
    python -m benchmarks.studies.compare_variants [--variants wgan-gp pggan] [--seeds 1] [--kimg 40] [--threads 1]

For each variant and seed: quality of 10,000 images of the averaged generator (Frechet distance, precision, recall,
density, coverage, all of digits features; modes and KL), and at ten points of the training the Frechet distance of
2,000 images and the norm of the gradient of the generator's loss that reaches an image from the discriminator (where
that loss is the minimax one's non-saturating form, of the saturating form too, at the same weights). Sample grids and
curves go to --figures as PNG, and a table is printed. dcgan and lsgan are compared as published, and with the R1 of
their digits presets as dcgan-r1 and lsgan-r1.

--speed times a step of every stage of each variant for a few seconds, and trains nothing: images per second and the
seconds of the table are worked out from it, so that a comparison may run on a busy machine and be timed on a quiet one.

A finished cell is kept in the file --cells; stopped and started again, the command goes on where it was. --table makes
the table and the curves of what is done.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastgan
from benchmarks.studies.result_cache import (
    ARMS,
    ROOT,
    Cells,
    Changes,
    Stopped,
    arguments,
    changed,
    merged,
    name_of,
    spread,
    start,
    table,
    train,
)
from fastgan import checkpoint, models
from fastgan.config import Config, replace
from fastgan.config.files import merge, read_yaml
from fastgan.config.stages import stages_of
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.models.pggan import Progressive
from fastgan.training.evaluator import drawer
from fastgan.training.factory import build_step
from fastgan.training.observability.metrics_log import save_grid
from fastgan.training.step_measurement import Bench
from fastgan.utils import counter_rng
from fastgan.utils.system import cache_folder

RESOLUTION = 32
POINTS = 10
CURVE_IMAGES = 2000
IMAGES = 10_000
SETTINGS: dict[str, Changes] = {arm: {"schedule": {"batch": 32}} for arm in ARMS}  # one batch for all


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
    latent = counter_rng.normal(0, "gradient", positions, generator.latent)  # type: ignore[arg-type]
    images = generator(latent).requires_grad_()
    loss = build_step(config, generator, discriminator, 0).loss.generator(discriminator(images))
    (gradient,) = torch.autograd.grad(len(images) * loss, images)
    return gradient.flatten(1).norm(dim=1).mean().item()


def settings(arm: str) -> Changes:
    return changed(arm, RESOLUTION, SETTINGS[arm])


def configured(arm: str, kimg: float) -> Config:
    """The configuration that an arm is trained with."""
    changes = merged(settings(arm), {"schedule": {"kimg": kimg}})
    return replace(VARIANTS[ARMS[arm][0]].config("digits"), **changes)


def step_key(resolution: int, fading: bool) -> str:
    return f"{resolution} px{', fading' if fading else ''}"


def speed(arm: str, kimg: float, seconds: float) -> dict[str, Any]:
    """Images per second of each kind of step that the arm takes, by `step_key`."""
    config = configured(arm, kimg)
    bench = Bench(config, torch.device("cpu"), 1, seconds)
    found = {}
    for stage in stages_of(config):
        for fading in [True] * (stage.fade_end > stage.start) + [False]:
            timing = bench.time(stage.resolution, config.schedule.batch, fading)
            taken = timing.d.seconds + timing.g.seconds / config.optimizer.n_critic
            found[step_key(stage.resolution, fading)] = config.schedule.batch / taken
    return {"images_per_second": found, "threads": torch.get_num_threads()}


def seconds_until(arm: str, kimg: float, speeds: dict[str, float], images: float) -> float:
    """Seconds of training until `images` have been seen."""
    total = 0.0
    for stage in stages_of(configured(arm, kimg)):
        total += max(min(images, stage.fade_end) - stage.start, 0) / speeds.get(step_key(stage.resolution, True), 1.0)
        whole = max(min(images, stage.end) - stage.fade_end, 0)
        total += whole / speeds[step_key(stage.resolution, False)]
    return total


def compute(variant: str, seed: int, kimg: float, runs: Path, figures: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Train one cell, or go on with it, and measure it."""
    run = runs / f"digits-{variant}-seed{seed}-{kimg:g}kimg"
    asked = f"--data digits --seed {seed} --keep 1000 --checkpoint-kimg {kimg / POINTS:g} --sample-kimg {kimg:g}"
    train(variant, run, kimg, settings(variant), [*asked.split(), *flags])
    values = read_yaml(run / "config.yaml", "RUN")
    values = {key: value for key, value in values.items() if key not in ("variant", "preset")}
    config = merge(Config(), values, str(run / "config.yaml"))
    source, extractor = open_source("digits", RESOLUTION), open_extractor("digits", 1)

    def evaluate(path: Path, metrics: list[str], n: int) -> dict[str, float]:
        trained = fastgan.load(path)
        evaluation = Evaluation(metrics, extractor, n, seed, cache_folder("evaluation"))
        draw = drawer(trained.module, trained.meta["networks"], source, seed)
        found = evaluation(draw, source, trained.meta["networks"]["resolution"], print)
        assert found is not None
        return found["metrics"]

    curve = []
    for path in checkpoint.existing(run):
        stored = checkpoint.read(path, "RUN")
        images = stored.meta["images"]
        point = {"kimg": images / 1000, "gradient": gradient_norm(stored, config)}
        if config.objective.loss == "minimax":
            saturating = replace(config, objective={"loss": "minimax-saturating"})
            point["gradient_saturating"] = gradient_norm(stored, saturating)
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
        "generator_parameters": sum(p.numel() for p in trained.module.parameters()),
        "curve": curve,
    }


def report(cells: Cells, kimg: float) -> str:
    """The table of what is done. Good enough, for its last column, is twice the best variant's final distance."""
    all_cells = {arm: found for arm in ARMS if (found := cells.of("digits", arm, kimg))}
    if not all_cells:
        return "no cell is done"
    best = min(sum(cell["frechet_distance"] for cell in found) / len(found) for found in all_cells.values())
    rows = []
    for arm, found in all_cells.items():
        names = {"frechet_distance": ".0f", "precision": ".2f", "recall": ".2f", "density": ".2f", "coverage": ".2f"}
        names |= {"modes": ".0f", "kl": ".3f"}
        values = [spread([cell[name] for cell in found], form) for name, form in names.items()]
        good = [
            next((point["kimg"] for point in cell["curve"] if point.get("frechet_distance", 1e9) <= 2 * best), None)
            for cell in found
        ]
        reached = [at for at in good if at is not None]
        rate = seconds = "-"
        if speeds := cells.done.get(f"speed/{arm}", {}).get("images_per_second"):
            rate = f"{1000 * kimg / seconds_until(arm, kimg, speeds, 1000 * kimg):.0f}"
            seconds = spread([seconds_until(arm, kimg, speeds, 1000 * at) for at in reached or [0.0]], ".0f")
        if len(reached) < len(found):
            seconds = f"{len(reached)} of {len(found)} reach it" if reached or len(found) > 1 else "not reached"
        at = spread(reached, ".0f") if len(reached) == len(found) else "-"
        rows.append([f"`{arm}`", str(len(found)), *values, rate, at, seconds, f"{found[0]['generator_parameters']:,}"])
    head = "variant|seeds|Frechet distance (digits features)|precision|recall|density|coverage|modes of 10|KL|images/s"
    quality = f"a distance of {2 * best:.0f}"
    return table([*head.split("|"), f"kimg to {quality}", f"seconds to {quality}", "parameters of G"], rows)


def curves(cells: Cells, kimg: float, figures: Path) -> list[Path]:
    """Frechet distance and gradient norm over training, each seed a line, as PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    written = []
    names = {"frechet_distance": "Frechet distance (digits features)", "gradient": "norm of the gradient reaching G"}
    for key, label in names.items():
        figure = Figure(figsize=(8.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for arm in ARMS:
            # The two with R1 are dashed, in the colors of those without.
            color = colormaps["tab10"](list(VARIANTS).index(ARMS[arm][0]))
            dashes = "-" if arm in VARIANTS else "--"
            for number, cell in enumerate(cells.of("digits", arm, kimg)):
                points = [(point["kimg"], point[key]) for point in cell["curve"] if key in point]
                if not points:
                    continue
                # A gradient may vanish to zero, which no logarithm shows.
                x, y = zip(*[(at, max(value, 1e-12)) for at, value in points], strict=True)
                axes.plot(x, y, dashes, color=color, label=None if number else arm, linewidth=1.3)
                saturating = [(point["kimg"], point.get("gradient_saturating")) for point in cell["curve"]]
                if key == "gradient" and all(value for _, value in saturating):
                    label_of = None if number else f"{arm}, saturating"
                    axes.plot(*zip(*saturating, strict=True), ":", color=color, label=label_of, linewidth=1.3)
        axes.set(xlabel="kimg", ylabel=label, yscale="log")
        if axes.lines:
            figure.legend(loc="outside right upper", fontsize=8)
        figures.mkdir(parents=True, exist_ok=True)
        written.append(figures / f"curves-{key.replace('_', '-')}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def main(argv: list[str]) -> int:
    parser = arguments(__doc__, "variants")
    parser.add_argument("--kimg", type=float, default=40.0)
    parser.add_argument("--speed", action="store_true", help="time steps, and train nothing")
    parser.add_argument("--measure-seconds", type=float, default=3.0, help="of each kind of step, for --speed")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "variants", help="where grids and curves go")
    asked = parser.parse_args(argv)
    cells, flags = start(asked)
    for arm in asked.variants if asked.speed else []:
        cells.keep(f"speed/{arm}", speed(arm, asked.kimg, asked.measure_seconds))
        print(f"speed/{arm}: {cells.done[f'speed/{arm}']['images_per_second']}", flush=True)
    order = [(seed, variant) for seed in range(asked.seeds) for variant in asked.variants]
    for seed, variant in [] if asked.table or asked.speed else order:
        work = functools.partial(compute, variant, seed, asked.kimg, asked.runs, asked.figures, flags)
        name = name_of("digits", variant, seed, asked.kimg)
        try:
            if cells.compute(name, work) is not None:
                print(f"{name}: done", flush=True)
        except Stopped:
            break
    print(report(cells, asked.kimg))
    if any(cells.of("digits", arm, asked.kimg) for arm in ARMS):
        print(f"curves: {', '.join(str(path) for path in curves(cells, asked.kimg, asked.figures))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
