"""How many modes each variant finds: of 25 Gaussians on a grid, of 8 on a ring, and of 1,000 stacked digits.

    python -m benchmarks.studies.mode_coverage [grid] [ring] [stacked] [--variants wgan-gp pggan] [--seeds 3]

grid, ring: small perceptrons, the same for all, with the loss, regularizer, optimizer and rates of each variant's
digits preset (spectral normalization stands for a regularizer in sagan); 2,500 samples. A mode is hit if a sample lies
within 3 standard deviations of it.
stacked: the variants' own networks at 16 px, with generators of one size, on images of three digits in three channels;
26,000 samples. A mode counts when a sample's three channels are all classified with a confidence of 0.9 or more; KL is
that of all samples' modes from the real ones'. Everything is taken from the moving average of the generator's weights.

A finished cell (task, variant, seed, budget) is kept in the file --cells; stopped and started again, the command goes
on where it was, inside a cell of `stacked` too. --table prints what is done and computes nothing.
"""

from __future__ import annotations

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
    Cells,
    Changes,
    Stopped,
    arguments,
    changed,
    name_of,
    spread,
    start,
    table,
    train,
)
from fastgan.config import Config, replace
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.training.distributed.torch_engine import TorchEngine
from fastgan.training.ema import Ema
from fastgan.training.evaluator import drawer
from fastgan.training.factory import build_step, optimizer_factory
from fastgan.training.step import frozen
from fastgan.utils import counter_rng

TASKS = ("grid", "ring", "stacked")
KIMG = {"grid": 1280.0, "ring": 1280.0, "stacked": 900.0}
SAMPLES = 2500
STACKED_SAMPLES = 26_000
# What three digits in one image need that one digit does not. The smaller batch gives twice the steps for an image
# budget, and pggan's low resolutions, where no digit can be read, are over early.
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
    """Samples of the mixture, float32 [N, 2], of (seed, position) alone."""
    means, deviation = centers(task)
    return means[counter_rng.integers(seed, task, positions, len(means))] + deviation * counter_rng.normal(
        seed, task, positions, 2
    )


def coverage(task: str, points: Tensor) -> dict[str, float]:
    """Share of modes with a point within 3 standard deviations, and share of points that are within that of a mode."""
    means, deviation = centers(task)
    distance, mode = torch.cdist(points.double(), means.double()).min(dim=1)
    near = distance <= 3 * deviation
    return {"modes": len(mode[near].unique()) / len(means), "near": near.double().mean().item()}


class Perceptron(nn.Module):
    """Three hidden layers of 128 leaky rectifiers; with one output it is a critic and gives scores [N]."""

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


def points_cell(task: str, variant: str, seed: int, kimg: float) -> dict[str, Any]:
    """Train perceptrons on a mixture and see where 2,500 samples lie."""
    name, changes = ARMS[variant]
    config: Config = replace(VARIANTS[name].config("digits"), **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, critic = Perceptron(_LATENT, 2, False), Perceptron(2, 1, variant == "sagan")
    step = build_step(config, generator, critic, 0)
    step.seed = seed
    ema = Ema(generator, config.optimizer.ema_decay, config.optimizer.ema_warmup)
    engine_g = TorchEngine(generator, optimizer_factory(config, discriminator=False), 1)
    engine_d = TorchEngine(critic, optimizer_factory(config, discriminator=True), 1)
    began, position = time.monotonic(), 0
    while position < 1000 * kimg:
        for _ in range(config.optimizer.n_critic):
            positions = torch.arange(position, position + _BATCH)
            loss, _ = step.discriminator_loss(real_points(task, seed, positions), positions)
            engine_d.backward(loss)
            engine_d.step()
            position += _BATCH
        with frozen(critic):
            loss, _ = step.generator_loss(positions)
            engine_g.backward(loss)
            engine_g.step()
        ema.update(generator)
    with torch.no_grad():
        points = ema.module(counter_rng.normal(seed, "sample", torch.arange(SAMPLES), _LATENT))
    return {**coverage(task, points), "kimg": kimg, "minutes": (time.monotonic() - began) / 60}


def stacked_cell(variant: str, seed: int, kimg: float, runs: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Train a variant on stacked digits and count the modes of 26,000 samples."""
    run = runs / f"stacked-{variant}-seed{seed}-{kimg:g}kimg"
    asked = f"--data stacked-digits --seed {seed} --keep 1 --sample-kimg {kimg:g}".split()
    began = time.monotonic()
    train(variant, run, kimg, changed(variant, 16, STACKED[variant]), [*asked, *flags])
    minutes = (time.monotonic() - began) / 60
    trained = fastgan.load(run)
    source = open_source("stacked-digits", 16, seed=seed)
    draw = drawer(trained.module, trained.meta["networks"], source, seed)
    found = Evaluation(["modes"], open_extractor("digits", 3), STACKED_SAMPLES, seed)(draw, source, 16, print)
    assert found is not None
    size = sum(p.numel() for p in trained.module.parameters())
    return {**found["metrics"], "kimg": kimg, "minutes": minutes, "generator_parameters": size}


def report(cells: Cells, tasks: Sequence[str], kimg: dict[str, float]) -> str:
    """Tables of the cells with these budgets."""
    parts = []
    for task in [task for task in ("grid", "ring") if task in tasks]:
        rows = []
        for variant in ARMS:
            found = cells.of(task, variant, kimg[task])
            if not found:
                continue
            hit = spread([100 * cell["modes"] for cell in found], ".0f")
            near = spread([100 * cell["near"] for cell in found], ".1f")
            rows.append([f"`{variant}`", str(len(found)), hit, near])
        head = ["variant", "seeds", "modes hit, %", "samples within 3 sigma, %"]
        parts.append(f"{task}, {kimg[task]:g} kimg\n\n{table(head, rows)}")
    if "stacked" in tasks:
        rows = []
        for variant in ARMS:
            found = cells.of("stacked", variant, kimg["stacked"])
            if not found:
                continue
            columns = [("modes", ".0f", 1), ("kl", ".3f", 1), ("confident", ".1f", 100), ("minutes", ".1f", 1)]
            values = [spread([k * cell[key] for cell in found], form) for key, form, k in columns]
            size = f"{found[0]['generator_parameters']:,}"
            rows.append([f"`{variant}`", str(len(found)), *values, size])
        head = ["variant", "seeds", "modes of 1,000", "KL, nats", "confident samples, %", "minutes", "parameters of G"]
        parts.append(f"stacked digits, {kimg['stacked']:g} kimg\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def main(argv: list[str]) -> int:
    parser = arguments(__doc__, "modes")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="grid, ring, stacked; default: all")
    parser.add_argument("--kimg", type=float, help="budget of every cell instead of " + str(KIMG))
    asked = parser.parse_args(argv)
    tasks = asked.tasks or list(TASKS)
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"TASK must be {', '.join(TASKS)}, got {unknown[0]!r}")
    kimg = {task: asked.kimg or KIMG[task] for task in TASKS}
    cells, flags = start(asked)
    order = [(seed, task, variant) for seed in range(asked.seeds) for task in tasks for variant in asked.variants]
    for seed, task, variant in [] if asked.table else order:

        def work(seed: int = seed, task: str = task, variant: str = variant) -> dict[str, Any]:
            if task == "stacked":
                return stacked_cell(variant, seed, kimg[task], asked.runs, flags)
            return points_cell(task, variant, seed, kimg[task])

        name = name_of(task, variant, seed, kimg[task])
        try:
            values = cells.compute(name, work)
        except Stopped:
            break
        if values is not None:
            print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in values.items())}", flush=True)
    print(report(cells, tasks, kimg))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
