"""Modes covered by each variant: of 25 Gaussians on a grid, of 8 on a ring, and of 1,000 stacked digits.

    python -m benchmarks.studies.mode_coverage [grid] [ring] [stacked] [--variants wgan-gp pggan] [--seeds 3]

grid, ring: the same small MLPs for all variants, with the loss, regularizer, optimizer and learning rates of each
variant's digits preset (sagan has spectral normalization instead of a regularizer); 2,500 samples. A mode is covered if
a sample lies within 3 standard deviations of it.
stacked: the variants' own networks at 16 px, with generators of the same size, on images of three digits in three
channels; 26,000 samples. A mode is covered if all three channels of a sample are classified with a confidence of at
least 0.9. KL is the divergence of the samples' modes from the real ones. All samples are from the EMA generator.

Finished results (task, variant, seed, budget) are stored in the file --results, and an interrupted command resumes,
also within a `stacked` run. --table prints the finished results.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fastgan
from benchmarks.studies.result_cache import (
    ARMS,
    Changes,
    ResultCache,
    argument_parser,
    changes_of,
    markdown_table,
    mean_and_range,
    open_cache,
    result_name,
    train_run,
)
from fastgan.config import Config, replace
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.evaluation.of_generator import drawer
from fastgan.training.distributed.torch_engine import TorchEngine
from fastgan.training.ema import Ema
from fastgan.training.from_config import build_step, optimizer_factory
from fastgan.training.step import frozen
from fastgan.utils import counter_rng

TASKS = ("grid", "ring", "stacked")
KIMG = {"grid": 1280.0, "ring": 1280.0, "stacked": 900.0}
SAMPLES = 2500
STACKED_SAMPLES = 26_000
# Changes to the digits presets for three digits in an image. The smaller batch gives twice as many steps for the same
# images, and pggan leaves its low resolutions, where digits cannot be recognized, early.
STACKED: dict[str, Changes] = {arm: {"schedule": {"batch": 32}} for arm in ARMS}
STACKED["wgan-div"]["optimizer"] = {"lr_g": 2e-3, "lr_d": 2e-3}
STACKED["pggan"]["optimizer"] = {"lr_g": 4e-3, "lr_d": 4e-3}
STACKED["pggan"]["schedule"] |= {"fade_kimg": 5.0, "stable_kimg": 5.0}
_BATCH = 256
_LATENT = 8
_WIDTH = 128


def centers(task: str) -> tuple[Tensor, float]:
    """Means of the Gaussians [modes, 2] and their standard deviation (Metz et al. 2017; Srivastava et al. 2017)."""
    if task == "grid":
        side = torch.arange(-4.0, 5.0, 2.0)
        return torch.cartesian_prod(side, side), 0.05
    angle = torch.arange(8) * (2 * math.pi / 8)
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.02


def real_points(task: str, seed: int, positions: Tensor) -> Tensor:
    """Samples of the mixture, float32 [N, 2], a function of (seed, position) only."""
    means, deviation = centers(task)
    return means[counter_rng.integers(seed, task, positions, len(means))] + deviation * counter_rng.normal(
        seed, task, positions, 2
    )


def coverage(task: str, points: Tensor) -> dict[str, float]:
    """Share of modes with a point within 3 standard deviations, and share of points within that of some mode."""
    means, deviation = centers(task)
    distance, mode = torch.cdist(points.double(), means.double()).min(dim=1)
    near = distance <= 3 * deviation
    return {"modes": len(mode[near].unique()) / len(means), "near": near.double().mean().item()}


class Perceptron(nn.Module):
    """MLP with three hidden layers of 128 units and leaky ReLU. With one output it returns scores [N]."""

    def __init__(self, inputs: int, outputs: int, normalized: bool) -> None:
        super().__init__()
        sizes = [inputs, _WIDTH, _WIDTH, _WIDTH, outputs]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            linear = nn.Linear(i, o)
            layers += [spectral_norm(linear) if normalized else linear, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])
        self.latent = inputs

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.layers(x)
        return x if x.shape[1] > 1 else x[:, 0]


def train_points(task: str, variant: str, seed: int, kimg: float) -> dict[str, Any]:
    """Train perceptrons on a mixture and measure the coverage of 2,500 samples."""
    name, changes = ARMS[variant]
    config: Config = replace(VARIANTS[name].config("digits"), **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, critic = Perceptron(_LATENT, 2, False), Perceptron(2, 1, variant == "sagan")
    step = build_step(replace(config, system={"precision": "fp32"}), generator, critic, 0)
    step.seed = seed
    ema = Ema(generator, config.optimizer.ema_decay, config.optimizer.ema_warmup)
    engine_g = TorchEngine(generator, optimizer_factory(config, discriminator=False), 1)
    engine_d = TorchEngine(critic, optimizer_factory(config, discriminator=True), 1)
    start, position = time.monotonic(), 0
    while position < 1000 * kimg:
        for _ in range(config.optimizer.n_critic):
            positions = torch.arange(position, position + _BATCH)
            real = real_points(task, seed, positions)
            loss, _ = step.discriminator_loss(real, positions)
            engine_d.backward(loss)
            engine_d.step()
            position += _BATCH
        with frozen(critic):
            loss, _ = step.generator_loss(positions, real)
            engine_g.backward(loss)
            engine_g.step()
        ema.update(generator)
    with torch.no_grad():
        points = ema.module(counter_rng.normal(seed, "sample", torch.arange(SAMPLES), _LATENT))
    return {**coverage(task, points), "kimg": kimg, "minutes": (time.monotonic() - start) / 60}


def train_stacked(variant: str, seed: int, kimg: float, runs: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Train a variant on stacked digits and count the modes of 26,000 samples."""
    run = runs / f"stacked-{variant}-seed{seed}-{kimg:g}kimg"
    own_flags = f"--data stacked-digits --seed {seed} --keep 1 --sample-kimg {kimg:g}".split()
    start = time.monotonic()
    train_run(variant, run, kimg, changes_of(variant, 16, STACKED[variant]), [*own_flags, *flags])
    minutes = (time.monotonic() - start) / 60
    trained = fastgan.load(run)
    source = open_source("stacked-digits", 16, seed=seed)
    draw = drawer(trained.module, trained.meta["networks"], source, seed)
    result = Evaluation(["modes"], open_extractor("digits", 3), STACKED_SAMPLES, seed)(draw, source, 16, print)
    assert result is not None
    size = sum(p.numel() for p in trained.module.parameters())
    return {**result["metrics"], "kimg": kimg, "minutes": minutes, "generator_parameters": size}


def report(cache: ResultCache, tasks: Sequence[str], kimg: dict[str, float]) -> str:
    """Tables of the finished results with these budgets."""
    parts = []
    for task in [task for task in ("grid", "ring") if task in tasks]:
        rows = []
        for variant in ARMS:
            results = cache.all_seeds(task, variant, kimg[task])
            if not results:
                continue
            covered = mean_and_range([100 * result["modes"] for result in results], ".0f")
            near = mean_and_range([100 * result["near"] for result in results], ".1f")
            rows.append([f"`{variant}`", str(len(results)), covered, near])
        head = ["variant", "seeds", "modes hit, %", "samples within 3 sigma, %"]
        parts.append(f"{task}, {kimg[task]:g} kimg\n\n{markdown_table(head, rows)}")
    if "stacked" in tasks:
        rows = []
        for variant in ARMS:
            results = cache.all_seeds("stacked", variant, kimg["stacked"])
            if not results:
                continue
            columns = [("modes", ".0f", 1), ("kl", ".3f", 1), ("confident", ".1f", 100), ("minutes", ".1f", 1)]
            values = [mean_and_range([k * result[key] for result in results], form) for key, form, k in columns]
            size = f"{results[0]['generator_parameters']:,}"
            rows.append([f"`{variant}`", str(len(results)), *values, size])
        head = ["variant", "seeds", "modes of 1,000", "KL, nats", "confident samples, %", "minutes", "parameters of G"]
        parts.append(f"stacked digits, {kimg['stacked']:g} kimg\n\n{markdown_table(head, rows)}")
    return "\n\n".join(parts)


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__, "modes")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="grid, ring, stacked; default: all")
    parser.add_argument("--kimg", type=float, help=f"training images in thousands, for all tasks; default: {KIMG}")
    args = parser.parse_args(argv)
    tasks = args.tasks or list(TASKS)
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"TASK must be {', '.join(TASKS)}, got {unknown[0]!r}")
    kimg = {task: args.kimg or KIMG[task] for task in TASKS}
    cache, flags = open_cache(args)
    order = [(seed, task, variant) for seed in range(args.seeds) for task in tasks for variant in args.variants]

    def train(seed: int, task: str, variant: str) -> dict[str, Any]:
        if task == "stacked":
            return train_stacked(variant, seed, kimg[task], args.runs, flags)
        return train_points(task, variant, seed, kimg[task])

    cache.compute_all(
        (
            (result_name(task, variant, seed, kimg[task]), functools.partial(train, seed, task, variant))
            for seed, task, variant in ([] if args.table else order)
        ),
        lambda values: ", ".join(f"{key} {value:.4g}" for key, value in values.items()),
    )
    print(report(cache, tasks, kimg))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
