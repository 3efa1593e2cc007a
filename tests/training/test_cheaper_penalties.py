"""`--penalty-every` and `--penalty-method finite-difference` in training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_reads import HostReads
from torch import Tensor, nn
from torch.autograd import Function

from fastgan import checkpoint, data
from fastgan.cli.train import parse
from fastgan.config import Config, replace
from fastgan.config.variants import VARIANTS
from fastgan.errors import ArgumentError
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.from_config import penalty_is_due, rates
from fastgan.training.observability.nonfinite import NonFiniteDetector
from fastgan.training.trainer import Trainer
from fastgan.utils import counter_rng

FLAGS = {
    "wgan-gp": "--penalty-every 3 --n-critic 2",
    "dcgan": "--penalty-every 2 --regularizer zero-centered --norm-d none --penalty-method finite-difference",
    "r3gan": "--penalty-method finite-difference",
}
WORLD = ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")


def make(variant: str, run: Path, *flags: str, resume: Path | None = None) -> Trainer:
    small = "--width 8 --max-width 8 --latent 8 --batch 8 --resolution 8 --deterministic".split()
    request = parse(["--variant", variant, *small, *FLAGS[variant].split(), *flags])
    source = data.open_source("digits", request.config.schedule.resolution)
    run.mkdir(exist_ok=True)
    stored = None if resume is None else checkpoint.read(resume, "--resume")
    return Trainer(request.config, variant, WORLD, source, run, stored)


def state(trainer: Trainer) -> list[Tensor]:
    engines = [value for engine in trainer.stage.engines for value in engine.state().values()]
    return [*engines, *(value for module in trainer.stage.modules for value in module.state_dict().values())]


def lazy(**objective: object) -> Config:
    return replace(VARIANTS["wgan-gp"].config("digits"), objective={"penalty_every": 4, **objective})


def test_a_penalty_is_due_after_every_kth_batch() -> None:
    due = [penalty_is_due(lazy(), 8 * step, 8) for step in range(12)]
    assert due == [False, False, False, True] * 3
    assert not any(penalty_is_due(lazy(penalty_every=1), 8 * step, 8) for step in range(12))
    assert not any(penalty_is_due(lazy(regularizer="none"), 8 * step, 8) for step in range(12))
    # A smaller batch after a growth begins anywhere: still one in four.
    assert sum(penalty_is_due(lazy(), 40 + 6 * step, 6) for step in range(40)) == 10


def test_rates_and_momenta_are_those_of_the_paper(tmp_path: Path) -> None:
    config = replace(lazy(), optimizer={"lr_d": 1e-3, "lr_g": 2e-3})
    assert rates(config, 0, 8) == (2e-3, pytest.approx(1e-3 * 4 / 5))
    trainer = make("wgan-gp", tmp_path, "--beta1", "0.5", "--beta2", "0.9")
    optimizers = [engine._optimizer for engine in trainer.stage.engines]  # type: ignore[attr-defined]
    assert optimizers[0].defaults["betas"] == (0.5, 0.9)
    assert optimizers[1].defaults["betas"] == pytest.approx((0.5**0.75, 0.9**0.75))


def test_steps_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    """Three critic steps on the Wasserstein loss, then one on three times the weighted penalty alone."""
    trainer = make("wgan-gp", tmp_path, "--n-critic", "3", "--penalty-weight", "7")
    step, config = trainer.stage.step, trainer.config
    critic = copy.deepcopy(step.discriminator)
    adam = torch.optim.Adam(
        critic.parameters(),
        config.optimizer.lr_d * 3 / 4,
        betas=(config.optimizer.beta1**0.75, config.optimizer.beta2**0.75),
    )
    reals: list[tuple[Tensor, Tensor]] = []
    discriminator_step = trainer.stage.discriminator_step

    def noted(batches: object, **options: bool) -> object:
        kept = list(batches)  # type: ignore[call-overload]
        reals.extend((batch.images.clone(), batch.positions.clone()) for batch in kept)
        return discriminator_step(kept, **options)

    trainer.stage.discriminator_step = noted  # type: ignore[method-assign,assignment]
    generator = copy.deepcopy(step.generator)
    trainer.train_step()
    assert len(reals) == 3

    def update(loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        for p in critic.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        adam.step()

    for real, positions in reals:
        with torch.no_grad():
            latent = counter_rng.normal(step.seed, "latent of D's step", positions, step.latent)
            fake = generator(latent, None)
        update(critic(fake).mean() - critic(real).mean())
    weight = counter_rng.uniform(step.seed, "interpolation", positions, 1)[:, :, None, None]
    x = torch.lerp(real, fake, weight).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    update(3 * 7 * (gradient.flatten(1).norm(dim=1) - 1).square().mean())
    for (name, ours), plain in zip(step.discriminator.named_parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_finite_differences_replace_the_penalty_in_the_loss(tmp_path: Path) -> None:
    step = make("r3gan", tmp_path, "--penalty-sigma", "0.1", "--penalty-weight", "5").stage.step
    real, positions = torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8)
    loss, seen = step.discriminator_loss(real, positions)
    step.penalty_every = 2
    without, of_it = step.discriminator_loss(real, positions)
    assert "penalty" in seen and "penalty" not in of_it
    with torch.no_grad():
        latent = counter_rng.normal(step.seed, "latent of D's step", positions, step.latent)
        pairs = (("real", real), ("generated", step.generator(latent, None)))
        expected = torch.zeros(())
        for name, images in pairs:
            u = counter_rng.normal(step.seed, f"direction at {name} images", positions, 64).view(8, 1, 8, 8)
            moved = (step.discriminator(images + 0.1 * u, None) - step.discriminator(images, None)) / 0.1
            expected = expected + moved.square().mean()
    torch.testing.assert_close(seen["penalty"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss - without, 5 * expected, rtol=1e-3, atol=1e-5)
    penalty, _ = step.penalty_loss(real, positions)
    torch.testing.assert_close(penalty, 10 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", FLAGS)
def test_steps_read_nothing_from_the_device(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(variant, tmp_path)
    calls: list[int] = []
    penalty_step: Callable[..., None] = trainer.stage.penalty_step
    monkeypatch.setattr(trainer.stage, "penalty_step", lambda batches: (calls.append(1), penalty_step(batches)))
    with HostReads(monkeypatch) as reads:
        for _ in range(6):
            trainer.train_step()
    assert not reads.seen
    assert len(calls) == {"wgan-gp": 4, "dcgan": 3, "r3gan": 0}[variant]


class _WithoutGradient(Function):
    """x, which does not depend on the parameter, as a lean op's gradient does not depend on its bias."""

    @staticmethod
    def forward(ctx: object, x: Tensor, parameter: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def test_a_parameter_without_a_gradient_is_finite() -> None:
    """Of a penalty alone the hooks of some biases see None."""
    layer = nn.Linear(2, 1)
    detector = NonFiniteDetector(torch.device("cpu"))
    detector.watch("discriminator", layer)
    detector.begin_step(0)
    _WithoutGradient.apply(layer.weight.sum(), layer.bias).backward()
    detector.close_step()
    assert layer.bias.grad is None and detector.first_bad(detector.pending()) is None


@pytest.mark.parametrize("variant", FLAGS)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(variant: str, tmp_path: Path) -> None:
    whole = make(variant, tmp_path / "whole")
    for _ in range(7):
        whole.train_step()
    first = make(variant, tmp_path / "first")
    for _ in range(4):
        first.train_step()
    second = make(variant, tmp_path / "first", resume=first.save())
    for _ in range(3):
        second.train_step()
    assert whole.images == second.images
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(second), strict=True))


def test_a_log_row_without_a_penalty_step_has_no_penalty(tmp_path: Path) -> None:
    flags = "--penalty-every 40 --n-critic 1 --kimg 0.4 --log-kimg 0.08 --samples 4 --compile off".split()
    make("wgan-gp", tmp_path, *flags).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["penalty" in row for row in rows] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--variant wgan-gp --penalty-method finite-difference", "must be exact with --regularizer gradient-penalty"),
        (
            "--variant sagan --regularizer zero-centered --penalty-method finite-difference",
            "must be exact with --model sagan",
        ),
        ("--variant wgan-gp --penalty-every 0", "--penalty-every must be at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_refused(flags: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        parse(flags.split())
