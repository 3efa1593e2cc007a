"""A step reads nothing back from its device, and notices what is not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from torch import Tensor, nn

from fastgan import checkpoint, data
from fastgan.cli.train import parse
from fastgan.config import Precision
from fastgan.objectives import Loss, gradient_penalty, relativistic, wasserstein
from fastgan.training.distributed import process_group as processes
from fastgan.training.observability.meters import Meters
from fastgan.training.step import Step
from fastgan.training.trainer import NonFiniteError, Trainer

SMALL = {
    "gan": "--width 16 --resolution 8",
    "dcgan": "--width 8 --max-width 8 --resolution 8",
    "wgan-gp": "--width 8 --max-width 8 --resolution 8 --n-critic 2",
    "sagan": "--width 8 --max-width 8 --resolution 8 --conditional",
    "pggan": "--fmap-base 32 --fmap-max 8 --resolution 8 --kimg 0.8",
    "r3gan": "--width 8 --max-width 8 --resolution 8",
}


def make(variant: str, run: Path, *flags: str) -> Trainer:
    request = parse(["--variant", variant, "--latent", "8", "--batch", "8", *SMALL[variant].split(), *flags])
    world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
    source = data.open_source("digits", request.config.schedule.resolution)
    run.mkdir(exist_ok=True)
    return Trainer(request.config, variant, world, source, run)


@pytest.mark.parametrize("variant", list(SMALL))
def test_twenty_steps_read_nothing(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--optimizer", "adam") if variant == "gan" else ()
    trainer = make(variant, tmp_path, *flags)
    if variant == "pggan":
        while trainer.stage.resolution < 8:  # a growth may read; the steps of a stage, fading or not, may not
            trainer.train_step()
    with HostReads(monkeypatch) as reads:
        for _ in range(20):
            trainer.train_step()
    assert not reads.seen
    with HostReads(monkeypatch) as reads:
        trainer.raise_if_nonfinite()
    assert reads.seen  # the counter sees a read where there is one


def test_a_rank_that_waits_draws_what_is_faded_in_so_far(tmp_path: Path) -> None:
    """It gets the first rank's weights for an evaluation, and must blend as far as that does."""
    trainer = make("pggan", tmp_path)
    while trainer.stage.resolution < 8:
        trainer.train_step()
    trainer.stage.share = dataclasses.replace(trainer.stage.share, is_spectator=True)
    trainer.train_step()
    average = trainer.stage.ema.module
    assert average.fade and 0 < average.alpha.item() < 1  # type: ignore[operator,union-attr]


def test_ranks_draw_for_an_evaluation_with_the_statistics_that_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("dcgan", tmp_path)
    trainer.world, shared, drawn = dataclasses.replace(trainer.world, size=2), [], []
    monkeypatch.setattr("fastgan.training.trainer.broadcast_tensors", shared.extend)

    def evaluator(generator: torch.nn.Module, meta: dict[str, Any]) -> None:
        drawn.append([b is s for b, s in zip(generator.buffers(), shared, strict=True)])

    trainer._evaluate(None, evaluator)  # type: ignore[arg-type]
    assert drawn and len(drawn[0]) > 0 and all(drawn[0])


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    yield make("wgan-gp", tmp_path, "--kimg", "1", "--log-kimg", "0.2", "--checkpoint-kimg", "0.05")


def test_loss_not_finite_stops_before_the_next_save(trainer: Trainer, tmp_path: Path) -> None:
    original = trainer.stage.step.discriminator_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss, seen = original(*args, **kwargs)
        return (loss * torch.nan if trainer.steps == 5 else loss), seen

    trainer.stage.step.discriminator_loss = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"step 5: loss of the discriminator .*last good checkpoint is .*kimg-"):
        trainer.run()
    saved = [checkpoint.read(path, "path").meta["steps"] for path in checkpoint.existing(tmp_path)]
    assert saved and max(saved) <= 5


def test_gradient_not_finite_is_named(trainer: Trainer) -> None:
    layer = trainer.stage.step.generator.layers[0].weight  # type: ignore[index,union-attr]
    layer.register_hook(lambda gradient: gradient * torch.inf if trainer.steps == 3 else None)
    with pytest.raises(NonFiniteError, match=r"step 3: gradient of generator\.layers\.0\.weight was not finite"):
        trainer.run()


def test_bad_gradient_of_a_leaf(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.stage.step.discriminator.layers[-1].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=r"step 0: loss of the discriminator .*there is no checkpoint yet"):
        trainer.run()


def test_zero_centered_penalty_is_part_of_the_loss(tmp_path: Path) -> None:
    """`--penalty-weight` times mean |grad D(x)|^2 on real images, added to the loss once."""
    flags = ("--regularizer", "zero-centered", "--norm-d", "none", "--penalty-weight")
    steps = [make("dcgan", tmp_path / weight, *flags, weight).stage.step for weight in ("0", "3")]
    real = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (without, _), (with_it, seen) = (step.discriminator_loss(real, torch.arange(8)) for step in steps)
    x = real.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(steps[1].discriminator(x).sum(), x)
    expected = gradient.square().sum(dim=(1, 2, 3)).mean()
    assert expected > 0
    torch.testing.assert_close(seen["penalty"], expected)
    torch.testing.assert_close(with_it - without, 3 * expected)


class _Generator(nn.Module):
    latent = 4

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, latent: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append(("G", latent, labels, torch.is_autocast_enabled("cpu")))
        return latent.view(-1, 1, 2, 2).tanh()


class _Discriminator(nn.Module):
    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append(("D", x.detach(), labels, torch.is_autocast_enabled("cpu")))
        return x.flatten(1).sum(dim=1)


def recorded(loss: Loss | None = None, **options: Any) -> tuple[Step, list[tuple[Any, ...]]]:
    """A step of two networks that note (which, input, labels, whether autocast was on) of every call."""
    calls: list[tuple[Any, ...]] = []
    return Step(_Generator(calls), _Discriminator(calls), loss=loss or wasserstein(), seed=1, **options), calls


REAL = torch.linspace(-1, 1, 32).view(8, 1, 2, 2)


def test_drift_is_the_mean_squared_score_of_real_images() -> None:
    (without, _), (with_it, _) = (recorded(drift=d)[0].discriminator_loss(REAL, torch.arange(8)) for d in (0.0, 0.5))
    torch.testing.assert_close(with_it - without, 0.5 * REAL.flatten(1).sum(dim=1).square().mean())


def test_both_networks_steps_have_latents_and_labels_of_their_own() -> None:
    step, calls = recorded(num_classes=10, penalty=(1.0, gradient_penalty))
    labels = torch.arange(8)
    step.discriminator_loss(REAL, torch.arange(8), labels)
    assert [who for who, *_ in calls] == ["G", "D", "D", "D"]  # the last is the penalty's
    assert all(given is labels for _, _, given, _ in calls)
    (_, latent, *_), _, (_, fake, *_), _ = calls
    torch.testing.assert_close(fake, latent.view(-1, 1, 2, 2).tanh())
    calls.clear()
    step.generator_loss(torch.arange(8))
    (_, other, drawn, _), (_, _, scored_as, _) = calls
    assert not torch.isclose(other, latent).any()
    assert drawn is scored_as and not drawn.equal(labels)


@pytest.mark.parametrize("generator_first", [True, False])
def test_the_network_that_stepped_last_comes_last(generator_first: bool) -> None:
    step, calls = recorded()
    step.discriminator_loss(REAL, torch.arange(8), generator_first=generator_first)
    assert [who for who, *_ in calls] == (["G", "D", "D"] if generator_first else ["D", "G", "D"])


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_networks_and_penalty_run_in_the_precision(precision: Precision) -> None:
    step, calls = recorded(precision=precision, penalty=(1.0, gradient_penalty))
    step.discriminator_loss(REAL, torch.arange(8))
    assert [autocast for *_, autocast in calls] == [precision in ("bf16", "fp16")] * 4


def test_meters_sum_and_count_until_they_are_cleared() -> None:
    meters = Meters()
    meters.add({"a": torch.tensor(1.5), "b": torch.tensor(4.0)})
    meters.add({"a": torch.tensor(2.0)})
    names, device = ["b", "a", "never"], torch.device("cpu")
    assert meters.totals(names, device).tolist() == [[4.0, 3.5, 0.0], [1.0, 2.0, 0.0]]
    meters.clear()
    assert meters.totals(names, device).tolist() == [[0.0] * 3] * 2


def test_a_paired_loss_scores_real_images_in_the_generators_step() -> None:
    """Those of the discriminator's step, with its weights of now; they send no gradient."""
    step, calls = recorded(loss=relativistic())
    loss, _ = step.generator_loss(torch.arange(8), REAL)
    assert [who for who, *_ in calls] == ["G", "D", "D"] and calls[2][1] is not None
    (_, fake, *_), (_, real, *_) = calls[1:]
    torch.testing.assert_close(real, REAL)
    expected = torch.nn.functional.softplus(REAL.flatten(1).sum(1) - fake.flatten(1).sum(1)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("variant", ["dcgan", "sagan", "pggan"])
def test_any_networks_train_with_the_relativistic_loss(variant: str, tmp_path: Path) -> None:
    """Labels and fades included: the generator's step sees the same real images as the discriminator's."""
    trainer = make(variant, tmp_path, "--loss", "relativistic", "--accumulation", "2")
    for _ in range(3):
        trainer.train_step()
    trainer.raise_if_nonfinite()
    assert trainer.steps == 3
