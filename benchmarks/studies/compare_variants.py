"""Nine variants on handwritten digits at 32 px, with the same generator size and the same number of training images.

    python -m benchmarks.studies.compare_variants --speed --threads 1
    python -m benchmarks.studies.compare_variants [--variants wgan-gp pggan] [--seeds 1] [--kimg 40] [--threads 1]

For each variant and seed: the quality of 10,000 images of the EMA generator (Frechet distance, precision, recall,
density, coverage, with digits features; modes and KL). At ten points of the training: the Frechet distance of 2,000
images, and the norm of the gradient of the generator's loss with respect to a generated image (for the non-saturating
minimax loss, also that of the saturating form at the same weights). Sample grids and curves are written to --figures as
PNG, and a table is printed. dcgan and lsgan are as published; dcgan-r1 and lsgan-r1 use R1 as in their digits presets.

--speed trains nothing: it times the steps of each stage of each variant for some seconds. Images per second and seconds
of the table come from these times, so training may run on a busy machine, and --speed later on an idle one.

Finished results are stored in the file --results, and an interrupted command resumes. --table prints the table and
draws the curves of finished results.
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
    Changes,
    ResultCache,
    argument_parser,
    changes_of,
    markdown_table,
    mean_and_range,
    merge_changes,
    open_cache,
    result_name,
    train_run,
)
from fastgan import checkpoint, data, models
from fastgan.config import Config, replace
from fastgan.config.files import merge, read_yaml
from fastgan.config.growth import stages_of
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.evaluation.of_generator import drawer
from fastgan.models.pggan import Progressive
from fastgan.training import precision
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.from_config import build_step
from fastgan.training.observability.metrics_log import save_grid
from fastgan.training.step_measurement import Bench
from fastgan.utils import counter_rng
from fastgan.utils.system import cache_folder

RESOLUTION = 32
POINTS = 10
CURVE_IMAGES = 2000
IMAGES = 10_000
SETTINGS: dict[str, Changes] = {arm: {"schedule": {"batch": 32}} for arm in ARMS}  # the same batch size for all


def gradient_norm(stored: checkpoint.Checkpoint, config: Config) -> float:
    """Mean norm of the gradient of the generator's loss with respect to a generated image, over 256 images.

    The weights are those of a checkpoint. Both networks are in training mode, as in the generator's step.
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
    loss_of = build_step(config, generator, discriminator, 0).loss
    pairs = [discriminator(_real_images(len(images), networks["resolution"]))] if loss_of.paired else []
    loss = loss_of.generator(discriminator(images), *pairs)
    (gradient,) = torch.autograd.grad(len(images) * loss, images)
    return gradient.flatten(1).norm(dim=1).mean().item()


def _real_images(count: int, resolution: int) -> torch.Tensor:
    source = data.open_source("digits", resolution)
    return data.open(source, resolution=resolution, seed=0).batch(0, count).images


def settings(arm: str) -> Changes:
    """All changes of an arm to its digits preset in this study."""
    return changes_of(arm, RESOLUTION, SETTINGS[arm])


def configured(arm: str, kimg: float) -> Config:
    """The configuration that an arm is trained with."""
    changes = merge_changes(settings(arm), {"schedule": {"kimg": kimg}})
    return replace(VARIANTS[ARMS[arm][0]].config("digits"), **changes)


def step_key(resolution: int, fading: bool) -> str:
    return f"{resolution} px{', fading' if fading else ''}"


def speed(arm: str, kimg: float, seconds: float) -> dict[str, Any]:
    """Images per second of each kind of step of an arm, by `step_key`."""
    world = ProcessGroup(0, 1, torch.device("cpu"), "torch", "measuring")
    config, _ = precision.resolve(configured(arm, kimg), ARMS[arm][0], world)
    bench = Bench(config, torch.device("cpu"), 1, seconds)
    rates = {}
    for stage in stages_of(config):
        for fading in [True] * (stage.fade_end > stage.start) + [False]:
            timing = bench.time(stage.resolution, config.schedule.batch, fading)
            seconds_per_step = timing.d.seconds + timing.g.seconds / config.optimizer.n_critic
            rates[step_key(stage.resolution, fading)] = config.schedule.batch / seconds_per_step
    return {"images_per_second": rates, "threads": torch.get_num_threads()}


def seconds_until(arm: str, kimg: float, speeds: dict[str, float], images: float) -> float:
    """Seconds of training for the first `images` images."""
    total = 0.0
    for stage in stages_of(configured(arm, kimg)):
        total += max(min(images, stage.fade_end) - stage.start, 0) / speeds.get(step_key(stage.resolution, True), 1.0)
        stable = max(min(images, stage.end) - stage.fade_end, 0)
        total += stable / speeds[step_key(stage.resolution, False)]
    return total


def train_and_measure(
    arm: str, seed: int, kimg: float, runs: Path, figures: Path, flags: Sequence[str]
) -> dict[str, Any]:
    """Train an arm with a seed, or resume it, and measure it. Returns the result to store."""
    run = runs / f"digits-{arm}-seed{seed}-{kimg:g}kimg"
    own_flags = f"--data digits --seed {seed} --keep 1000 --checkpoint-kimg {kimg / POINTS:g} --sample-kimg {kimg:g}"
    train_run(arm, run, kimg, settings(arm), [*own_flags.split(), *flags])
    values = read_yaml(run / "config.yaml", "RUN")
    values = {key: value for key, value in values.items() if key not in ("variant", "preset")}
    config = merge(Config(), values, str(run / "config.yaml"))
    source, extractor = open_source("digits", RESOLUTION), open_extractor("digits", 1)

    def evaluate(path: Path, metrics: list[str], n: int) -> dict[str, float]:
        trained = fastgan.load(path)
        evaluation = Evaluation(metrics, extractor, n, seed, cache_folder("evaluation"))
        draw = drawer(trained.module, trained.meta["networks"], source, seed)
        result = evaluation(draw, source, trained.meta["networks"]["resolution"], print)
        assert result is not None
        return result["metrics"]

    curve = []
    for path in checkpoint.existing(run):
        stored = checkpoint.read(path, "RUN")
        images = stored.meta["images"]
        point = {"kimg": images / 1000, "gradient": gradient_norm(stored, config)}
        if config.objective.loss == "minimax":
            saturating = replace(config, objective={"loss": "minimax-saturating"})
            point["gradient_saturating"] = gradient_norm(stored, saturating)
        # Before it is fully grown, a generator is compared with smaller real images: not comparable.
        if stored.meta["resolution"] == RESOLUTION:
            point["frechet_distance"] = evaluate(path, ["fid"], CURVE_IMAGES)["frechet_distance"]
        curve.append(point)
    trained = fastgan.load(run)
    figures.mkdir(parents=True, exist_ok=True)
    save_grid(trained.sample(64, seed), figures / f"{arm}-seed{seed}.png")
    return {
        **evaluate(run, ["fid", "prdc", "modes"], IMAGES),
        "kimg": kimg,
        "generator_parameters": sum(p.numel() for p in trained.module.parameters()),
        "curve": curve,
    }


def report(cache: ResultCache, kimg: float) -> str:
    """The table of finished results. The threshold for "kimg to" and "seconds to" is twice the best final distance."""
    by_arm = {arm: results for arm in ARMS if (results := cache.all_seeds("digits", arm, kimg))}
    if not by_arm:
        return "no finished results"
    best = min(sum(result["frechet_distance"] for result in results) / len(results) for results in by_arm.values())
    rows = []
    for arm, results in by_arm.items():
        names = {"frechet_distance": ".0f", "precision": ".2f", "recall": ".2f", "density": ".2f", "coverage": ".2f"}
        names |= {"modes": ".0f", "kl": ".3f"}
        values = [mean_and_range([result[name] for result in results], form) for name, form in names.items()]
        first_good = [
            next((point["kimg"] for point in result["curve"] if point.get("frechet_distance", 1e9) <= 2 * best), None)
            for result in results
        ]
        reached = [at for at in first_good if at is not None]
        rate = seconds = "-"
        if speeds := cache.results.get(f"speed/{arm}", {}).get("images_per_second"):
            rate = f"{1000 * kimg / seconds_until(arm, kimg, speeds, 1000 * kimg):.0f}"
            seconds = mean_and_range([seconds_until(arm, kimg, speeds, 1000 * at) for at in reached or [0.0]], ".0f")
        if len(reached) < len(results):
            several = reached or len(results) > 1
            seconds = f"{len(reached)} of {len(results)} reach it" if several else "not reached"
        at = mean_and_range(reached, ".0f") if len(reached) == len(results) else "-"
        parameters = f"{results[0]['generator_parameters']:,}"
        rows.append([f"`{arm}`", str(len(results)), *values, rate, at, seconds, parameters])
    head = "variant|seeds|Frechet distance (digits features)|precision|recall|density|coverage|modes of 10|KL|images/s"
    quality = f"a distance of {2 * best:.0f}"
    return markdown_table([*head.split("|"), f"kimg to {quality}", f"seconds to {quality}", "parameters of G"], rows)


def draw_curves(cache: ResultCache, kimg: float, figures: Path) -> list[Path]:
    """Draw Frechet distance and gradient norm over training as PNG, with a line for each seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    written = []
    names = {"frechet_distance": "Frechet distance (digits features)", "gradient": "norm of the gradient reaching G"}
    for key, label in names.items():
        figure = Figure(figsize=(8.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for arm in ARMS:
            # The arms with R1 are dashed, in the color of those without.
            color = colormaps["tab10"](list(VARIANTS).index(ARMS[arm][0]))
            dashes = "-" if arm in VARIANTS else "--"
            for number, result in enumerate(cache.all_seeds("digits", arm, kimg)):
                points = [(point["kimg"], point[key]) for point in result["curve"] if key in point]
                if not points:
                    continue
                # A gradient may vanish, and the axis is logarithmic.
                x, y = zip(*[(at, max(value, 1e-12)) for at, value in points], strict=True)
                axes.plot(x, y, dashes, color=color, label=None if number else arm, linewidth=1.3)
                saturating = [(point["kimg"], point.get("gradient_saturating")) for point in result["curve"]]
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
    parser = argument_parser(__doc__, "variants")
    parser.add_argument("--kimg", type=float, default=40.0, help="training images, in thousands")
    parser.add_argument("--speed", action="store_true", help="time steps only, without training")
    parser.add_argument("--measure-seconds", type=float, default=3.0, help="duration of each measurement of --speed")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "variants", help="folder of grids and curves")
    args = parser.parse_args(argv)
    cache, flags = open_cache(args)
    for arm in args.variants if args.speed else []:
        cache.store(f"speed/{arm}", speed(arm, args.kimg, args.measure_seconds))
        print(f"speed/{arm}: {cache.results[f'speed/{arm}']['images_per_second']}", flush=True)
    order = [(seed, arm) for seed in range(args.seeds) for arm in args.variants]
    cache.compute_all(
        (
            result_name("digits", arm, seed, args.kimg),
            functools.partial(train_and_measure, arm, seed, args.kimg, args.runs, args.figures, flags),
        )
        for seed, arm in ([] if args.table or args.speed else order)
    )
    print(report(cache, args.kimg))
    if any(cache.all_seeds("digits", arm, args.kimg) for arm in ARMS):
        print(f"curves: {', '.join(str(path) for path in draw_curves(cache, args.kimg, args.figures))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
