"""Cheaper penalties beside the exact one: cost of a step, variance of the estimate, quality after equal time.

    python -m benchmarks.studies.cheaper_penalties --speed --threads 1       # on an idle machine
    python -m benchmarks.studies.cheaper_penalties --threads 1 [--variants dcgan r3gan wgan-gp] [--seeds 3]
    python -m benchmarks.studies.cheaper_penalties --variance

Every run is the digits preset of its variant, changed in its penalty alone. --speed times the steps of all arms in
turns. Training gives each arm the images that it sees in the time of the exact arm's whole run, by these times, and
measures the Frechet distance of --images images of the EMA generator. --variance takes the networks of the exact arm's
first run and compares the penalty's weight gradients of --batches batches: the sum of their variances over the squared
norm of their mean. A penalty every k steps with k times the weight has k times the variance over the same steps.

Finished cells are stored in --results, each when it is done; an interrupted command resumes. --table prints the table.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgan
from benchmarks.studies.result_cache import (
    Changes,
    ResultCache,
    argument_parser,
    diverged,
    markdown_table,
    mean_and_range,
    open_cache,
    result_name,
    train_run,
)
from fastgan import checkpoint, data, models
from fastgan.config import Config, batch_at, replace
from fastgan.config.growth import stages_of
from fastgan.config.rules import ZERO_CENTERED
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.training.evaluator import drawer
from fastgan.training.from_config import build_step, network_values
from fastgan.training.step_measurement import Bench
from fastgan.utils.system import cache_folder

_DIFFERENCES = {"penalty_method": "finite-difference"}
ARMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "every 4": {"penalty_every": 4},
    "every 16": {"penalty_every": 16},
    "differences": _DIFFERENCES,
    "differences, sigma 0.1": {**_DIFFERENCES, "penalty_sigma": 0.1},
    "differences, every 4": {**_DIFFERENCES, "penalty_every": 4},
}
TURNS = 5


def arms_of(variant: str) -> list[str]:
    """Names of the arms that the variant's regularizer has."""
    estimable = VARIANTS[variant].config("digits").objective.regularizer in ZERO_CENTERED
    return [name for name, changes in ARMS.items() if estimable or "penalty_method" not in changes]


def configured(variant: str, arm: str) -> Config:
    return replace(VARIANTS[variant].config("digits"), objective=ARMS[arm], system={"precision": "fp32"})


def step_seconds(variant: str, arm: str, seconds: float) -> float:
    """Seconds of an image's share of a step, at the last resolution."""
    config = configured(variant, arm)
    stage = stages_of(config)[-1]
    batch = batch_at(config.schedule, stage.resolution)
    timing = Bench(config, torch.device("cpu"), 1, seconds).time(stage.resolution, batch, False)
    return (timing.d.seconds + timing.g.seconds / config.optimizer.n_critic) / batch


def time_in_turns(variant: str, seconds: float) -> dict[str, float]:
    """Median over turns of `step_seconds` of every arm."""
    times: dict[str, list[float]] = {arm: [] for arm in arms_of(variant)}
    for _ in range(TURNS):
        for arm, found in times.items():
            found.append(step_seconds(variant, arm, seconds / TURNS))
    return {arm: statistics.median(found) for arm, found in times.items()}


def kimg_at_equal_time(variant: str, arm: str, speed: dict[str, float], share: float) -> float:
    """Length of an arm's runs, in the time of the exact arm's."""
    return round(share * VARIANTS[variant].config("digits").schedule.kimg * speed["exact"] / speed[arm], 3)


def train_and_measure(
    variant: str, arm: str, seed: int, kimg: float, args: Any, flags: Sequence[str]
) -> dict[str, Any]:
    """Train an arm, or resume it, and measure it. Returns the cell to store."""
    changes: Changes = {"objective": ARMS[arm], "system": {"precision": "fp32", "compile": "off"}}
    run = run_of(variant, arm, seed, kimg, args)
    try:
        train_run(variant, run, kimg, changes, [*f"--data digits --seed {seed} --sample-kimg {kimg:g}".split(), *flags])
    except subprocess.CalledProcessError:
        reason = diverged(run)
        if reason is None:
            raise
        return {"kimg": kimg, "diverged": reason}
    source = open_source("digits", VARIANTS[variant].config("digits").schedule.resolution)
    trained = fastgan.load(run)
    draw = drawer(trained.module, trained.meta["networks"], source, seed)
    extractor = open_extractor("digits", source.channels)
    evaluation = Evaluation(["fid"], extractor, args.images, seed, cache_folder("evaluation"))
    result = evaluation(draw, source, source.resolution, print)
    assert result is not None
    return {"kimg": kimg, "torch": torch.__version__, "frechet_distance": result["metrics"]["frechet_distance"]}


def run_of(variant: str, arm: str, seed: int, kimg: float, args: Any) -> Path:
    return args.runs / f"{variant}-{arm.replace(', ', '-').replace(' ', '')}-seed{seed}-{kimg:g}kimg"


def penalty_gradients(variant: str, arm: str, weights: dict[str, dict[str, Tensor]] | None, batches: int) -> Tensor:
    """Gradients of the penalty, without its coefficient, on batches of real digits, [batches, weights].

    Args:
        variant, arm: see above.
        weights: of both networks; None: new ones.
        batches: how many.
    """
    config = configured(variant, arm)
    resolution, batch = config.schedule.resolution, batch_at(config.schedule, config.schedule.resolution)
    torch.manual_seed(0)
    source = open_source("digits", resolution)
    networks = network_values(config.networks, resolution=resolution, channels=1, num_classes=0)
    generator, discriminator = models.build(**networks)
    if weights is not None:
        generator.load_state_dict(weights["generator"])
        discriminator.load_state_dict(weights["discriminator"])
    step = build_step(config, generator, discriminator, 0)
    assert step.penalty is not None
    parameters = [p for p in discriminator.parameters() if p.ndim > 1]  # the exact penalty has no gradient for biases
    pipeline, rows = data.open(source, resolution=resolution, seed=0), []
    for i in range(batches):
        real = pipeline.batch(i * batch, batch)
        loss, _ = step.penalty_loss(real.images, real.positions)
        found = torch.autograd.grad(loss / (step.penalty_every * step.penalty[0]), parameters)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def relative_variance(gradients: Tensor, every: int) -> float:
    """Sum of the variances over the squared norm of the mean; of a step's share, for a penalty in one of `every`."""
    mean = gradients.mean(dim=0)
    return every * float(gradients.var(dim=0).sum() / mean.square().sum())


def variances(variant: str, args: Any, speed: dict[str, float]) -> dict[str, Any]:
    run = run_of(variant, "exact", 0, kimg_at_equal_time(variant, "exact", speed, args.share), args)
    trained = bool(checkpoint.existing(run))
    weights = checkpoint.read(checkpoint.existing(run)[-1], "RUN").training() if trained else None
    found = {
        arm: relative_variance(
            penalty_gradients(variant, arm, weights, args.batches), ARMS[arm].get("penalty_every", 1)
        )
        for arm in arms_of(variant)
    }
    return {**found, "trained": trained}


def report(cache: ResultCache, args: Any) -> str:
    """The table of finished cells."""
    rows = []
    for variant in args.variants:
        speed, variance = (cache.results.get(f"{what}/{variant}", {}) for what in ("speed", "variance"))
        for arm in arms_of(variant):
            faster = f"{speed['exact'] / speed[arm]:.2f}x" if arm in speed else "-"
            noise = f"{variance[arm]:.3g}" if arm in variance else "-"
            kimg = kimg_at_equal_time(variant, arm, speed, args.share) if arm in speed else None
            cells = [] if kimg is None else cache.all_seeds("digits", f"{variant}/{arm}", kimg)
            whole = [cell["frechet_distance"] for cell in cells if "diverged" not in cell]
            distance = mean_and_range(whole, ".1f") if whole else "-"
            length = "-" if kimg is None else f"{kimg:g}"
            rows.append([f"`{variant}`", arm, faster, noise, length, str(len(cells)), distance])
    head = "variant|penalty|steps beside exact|relative variance of its gradient|kimg at equal time|seeds"
    return markdown_table([*head.split("|"), "Frechet distance"], rows)


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__, "cheaper_penalties")
    parser.set_defaults(variants=["dcgan", "r3gan", "wgan-gp"])
    parser.add_argument("--share", type=float, default=1.0, help="share of each preset's images")
    parser.add_argument("--images", type=int, default=5000, help="generated images of an evaluation")
    parser.add_argument("--batches", type=int, default=64, help="batches of --variance")
    parser.add_argument("--speed", action="store_true", help="time steps only, without training")
    parser.add_argument("--variance", action="store_true", help="compare gradients only, without training")
    parser.add_argument("--measure-seconds", type=float, default=10.0, help="duration of the measurement of an arm")
    args = parser.parse_args(argv)
    cache, flags = open_cache(args)
    for variant in args.variants:
        if args.speed:
            cache.store(f"speed/{variant}", time_in_turns(variant, args.measure_seconds))
            print(f"speed/{variant}: {cache.results[f'speed/{variant}']}", flush=True)
        elif not args.table and f"speed/{variant}" not in cache.results:
            parser.error("run --speed first: equal time is by these times")
    if args.variance:
        for variant in args.variants:
            cache.store(f"variance/{variant}", variances(variant, args, cache.results[f"speed/{variant}"]))
    train = not (args.table or args.speed or args.variance)
    order = [(v, seed, arm) for v in args.variants for seed in range(args.seeds) for arm in arms_of(v)]
    cells = []
    for variant, seed, arm in order if train else []:
        kimg = kimg_at_equal_time(variant, arm, cache.results[f"speed/{variant}"], args.share)
        work = functools.partial(train_and_measure, variant, arm, seed, kimg, args, flags)
        cells.append((result_name("digits", f"{variant}/{arm}", seed, kimg), work))
    cache.compute_all(cells)
    print(report(cache, args))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
