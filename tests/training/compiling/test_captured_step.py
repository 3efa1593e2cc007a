"""A recorded step, repeated on static buffers, is an eager step to the bit: in every variant, engine and setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import SMALL
from torch import Tensor

from fastgan import data
from fastgan.cli.train import parse
from fastgan.config import batch_at
from fastgan.config.growth import stage_at
from fastgan.config.variants import VARIANTS
from fastgan.data import Batch
from fastgan.training.compiling import captured_step
from fastgan.training.compiling.captured_step import WARM_UP_STEPS, CapturedStep, StaticStep, unsupported_reason
from fastgan.training.distributed import process_group as processes
from fastgan.training.from_config import rates
from fastgan.training.trainer import Trainer

CASES = {
    **{name: (name, []) for name in VARIANTS},
    "accumulation": ("wgan-gp", ["--accumulation", "2", "--n-critic", "2"]),
    "rates that fall": ("dcgan", ["--lr-decay", "1", "--kimg", "0.2"]),
    "fp16": ("wgan-gp", ["--precision", "fp16"]),
    "ada": ("dcgan", ["--augment", "ada"]),
    "diffaugment": ("r3gan", ["--augment", "diffaugment"]),
}


def make(case: str, run: Path) -> Trainer:
    variant, flags = CASES[case]
    small = SMALL[VARIANTS[variant].config("paper").networks.model]
    words = ["--variant", variant, "--latent", "8", "--batch", "8", *small.split(), *flags]
    config = parse(words).config
    run.mkdir(exist_ok=True)
    world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
    trainer = Trainer(config, variant, world, data.open_source("digits", config.schedule.resolution), run)
    while variant == "pggan" and not trainer.stage.fades:
        trainer.train_step()
    return trainer


def next_step(trainer: Trainer) -> list[Batch]:
    """The micro-batches of the next step, with everything set that `Trainer.train_step` sets before and after them."""
    stage, config = trainer.stage, trainer.config
    stage.set_alpha(stage_at(trainer.stages, trainer.images).alpha(trainer.images))
    rate_g, rate_d = rates(config, trainer.images, stage.resolution)
    stage.generator_engine.set_rate(rate_g)
    stage.discriminator_engine.set_rate(rate_d)
    stage.nonfinite.begin_step(trainer.steps)
    batch, batches = batch_at(config.schedule, stage.resolution), []
    for _ in range(config.optimizer.n_critic):
        batches += list(trainer.feed.micro_batches(trainer.images, batch, stage.share))
        trainer.images += batch
    trainer.steps += 1
    return batches


def state(trainer: Trainer) -> dict[str, Tensor]:
    stage = trainer.stage
    found = {f"{i}": x.clone() for i, x in enumerate(captured_step._changed(stage))}
    for name, engine in zip("gd", stage.engines, strict=True):
        found |= {f"{name}.{key}": value for key, value in engine.state().items()}
    return found | {"meters": trainer.meters.totals(stage.step.metrics, torch.device("cpu"))}


QUICK = ("pggan", "accumulation")


@pytest.mark.parametrize("case", [pytest.param(it, marks=[] if it in QUICK else pytest.mark.slow) for it in CASES])
def test_replay_is_eager_to_the_bit(case: str, tmp_path: Path) -> None:
    """From a step's state on: other images, positions, rates and blend than when it was recorded."""
    ours, theirs = (make(case, tmp_path / name) for name in ("ours", "theirs"))
    assert unsupported_reason(ours.stage) is None
    captured, eager = CapturedStep(ours.stage), None
    for i in range(WARM_UP_STEPS + 4):
        captured.step(next_step(ours))
        batches = next_step(theirs)
        eager = eager or StaticStep(theirs.stage, batches)  # the rate as a tensor of float32, as there
        eager.load(batches)
        eager.run()
        assert captured.form == ("eager" if i < WARM_UP_STEPS else "captured"), captured.refusal
    assert captured.difference == 0.0
    mine, its = state(ours), state(theirs)
    assert mine.keys() == its.keys() and len(mine) > 10
    different = [name for name in mine if not torch.equal(mine[name], its[name])]
    assert not different
    counts = mine["meters"][1]
    assert counts.max() >= WARM_UP_STEPS + 4  # the recorded step goes on counting
    ours.raise_if_nonfinite()


def test_a_replayed_step_still_watches_for_what_is_not_finite(tmp_path: Path) -> None:
    trainer = make("wgan-gp", tmp_path)
    captured = CapturedStep(trainer.stage)
    for _ in range(WARM_UP_STEPS + 2):
        captured.step(next_step(trainer))
    trainer.raise_if_nonfinite()
    batches = next_step(trainer)
    captured.step([Batch(torch.full_like(x.images, torch.nan), x.labels, x.positions) for x in batches])
    first = trainer.stage.nonfinite.first_bad(trainer.stage.nonfinite.pending())
    assert first is not None and first[0] == WARM_UP_STEPS + 2 and first[1] == "loss of the discriminator"


def run_steps(trainer: Trainer, captured: CapturedStep, count: int) -> None:
    for _ in range(count):
        captured.step(next_step(trainer))


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_a_capture_that_is_wrong_or_fails_leaves_the_step_eager(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (make("dcgan", tmp_path / name) for name in ("ours", "theirs"))

    def capture(run: Any, device: torch.device) -> Any:
        if fault == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        return lambda: ours.stage.ema.steps.add_(1000)

    monkeypatch.setattr(captured_step, "capture", capture)
    captured, eager = CapturedStep(ours.stage), CapturedStep(theirs.stage)
    run_steps(ours, captured, WARM_UP_STEPS + 3)
    eager.refusal = "not to be captured"
    run_steps(theirs, eager, WARM_UP_STEPS + 3)
    assert captured.form == "eager" and captured.refusal is not None
    assert ("differs from an eager one" if fault == "wrong" else "when stream is capturing") in captured.refusal
    assert "\n" not in captured.refusal
    mine, its = state(ours), state(theirs)
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_what_cannot_be_captured_says_why(tmp_path: Path) -> None:
    trainer = make("dcgan", tmp_path)
    assert unsupported_reason(trainer.stage) is None
    trainer.stage.world = processes.ProcessGroup(0, 2, torch.device("cpu"), "torch", "test")
    assert unsupported_reason(trainer.stage) == "gradients are averaged between ranks"
    trainer.stage.world = processes.ProcessGroup(0, 1, torch.device("cpu"), "deepspeed", "test")
    assert "DeepSpeed" in (unsupported_reason(trainer.stage) or "")
