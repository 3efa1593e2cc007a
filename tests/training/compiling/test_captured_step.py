"""A recorded step, repeated on static buffers, is an eager step to the bit: in every variant, engine and setting."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from small_networks import SMALL
from torch import Tensor

from fastgan import checkpoint, data
from fastgan.cli.train import parse
from fastgan.config import batch_at, replace
from fastgan.config.growth import stage_at
from fastgan.config.variants import VARIANTS
from fastgan.data import Batch
from fastgan.training.compiling import captured_step, capturing
from fastgan.training.compiling.captured_step import WARM_UP_STEPS, CapturedStep, StaticStep, unsupported_reason
from fastgan.training.distributed import process_group as processes
from fastgan.training.from_config import penalty_is_due, rates
from fastgan.training.trainer import Trainer

CASES = {
    **{name: (name, []) for name in VARIANTS},
    "accumulation": ("wgan-gp", ["--accumulation", "2", "--n-critic", "2"]),
    "rates that fall": ("dcgan", ["--lr-decay", "1", "--kimg", "0.2"]),
    "fp16": ("wgan-gp", ["--precision", "fp16"]),
    "ada": ("dcgan", ["--augment", "ada"]),
    "a penalty of its own": ("wgan-gp", ["--penalty-every", "2", "--n-critic", "1"]),
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


def next_step(trainer: Trainer) -> tuple[list[Batch], tuple[bool, ...]]:
    """The arguments of the next `CapturedStep.step`, with all set that `Trainer.train_step` sets before and after."""
    stage, config = trainer.stage, trainer.config
    stage.set_alpha(stage_at(trainer.stages, trainer.images).alpha(trainer.images))
    rate_g, rate_d = rates(config, trainer.images, stage.resolution)
    stage.generator_engine.set_rate(rate_g)
    stage.discriminator_engine.set_rate(rate_d)
    stage.nonfinite.begin_step(trainer.steps)
    batch, batches, penalize = batch_at(config.schedule, stage.resolution), [], []
    for _ in range(config.optimizer.n_critic):
        penalize.append(penalty_is_due(config, trainer.images, batch))
        batches += list(trainer.feed.micro_batches(trainer.images, batch, stage.share))
        trainer.images += batch
    trainer.steps += 1
    return batches, tuple(penalize)


def state(trainer: Trainer) -> dict[str, Tensor]:
    stage = trainer.stage
    summed = {id(x) for x in trainer.meters.tensors()}  # in an order of their own; see "meters"
    found = {f"{i}": x.clone() for i, x in enumerate(captured_step._changed(stage)) if id(x) not in summed}
    for name, engine in zip("gd", stage.engines, strict=True):
        found |= {f"{name}.{key}": value for key, value in engine.state().items()}
    return found | {"meters": trainer.meters.totals(stage.step.metrics, torch.device("cpu"))}


@pytest.mark.slow  # a run that grows and fades is below
@pytest.mark.parametrize("case", CASES)
def test_replay_is_eager_to_the_bit(case: str, tmp_path: Path) -> None:
    """From a step's state on: other images, positions, rates and blend than when it was recorded."""
    ours, theirs = (make(case, tmp_path / name) for name in ("ours", "theirs"))
    assert unsupported_reason(ours.stage) is None
    captured, eager, seen = CapturedStep(ours.stage), None, Counter[tuple[bool, ...]]()
    while min(seen.values(), default=0) < WARM_UP_STEPS + 3:
        batches, penalize = next_step(ours)
        captured.step(batches, penalize)
        batches, again = next_step(theirs)
        assert again == penalize
        eager = eager or StaticStep(theirs.stage, batches)  # the rate as a tensor of float32, as there
        eager.load(batches)
        eager.run(penalize)
        seen[penalize] += 1
        assert (penalize in captured._replays) == (seen[penalize] > WARM_UP_STEPS), captured.refusal
    assert captured.difference == 0.0 and len(seen) == (2 if case == "a penalty of its own" else 1)
    mine, its = state(ours), state(theirs)
    assert mine.keys() == its.keys() and len(mine) > 10
    different = [name for name in mine if not torch.equal(mine[name], its[name])]
    assert not different
    counts = mine["meters"][1]
    assert counts.max() >= WARM_UP_STEPS + 3  # the recorded step goes on counting
    ours.raise_if_nonfinite()


def test_a_replayed_step_still_watches_for_what_is_not_finite(tmp_path: Path) -> None:
    trainer = make("wgan-gp", tmp_path)
    captured = CapturedStep(trainer.stage)
    for _ in range(WARM_UP_STEPS + 2):
        captured.step(*next_step(trainer))
    trainer.raise_if_nonfinite()
    batches, _ = next_step(trainer)
    captured.step([Batch(torch.full_like(x.images, torch.nan), x.labels, x.positions) for x in batches])
    first = trainer.stage.nonfinite.first_bad(trainer.stage.nonfinite.pending())
    assert first is not None and first[0] == WARM_UP_STEPS + 2 and first[1] == "loss of the discriminator"


def run_steps(trainer: Trainer, captured: CapturedStep, count: int) -> None:
    for _ in range(count):
        captured.step(*next_step(trainer))


@pytest.mark.parametrize("fault", ["wrong", "fails", "fails half-way"])
def test_a_capture_that_is_wrong_or_fails_leaves_the_step_eager(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (make("dcgan", tmp_path / name) for name in ("ours", "theirs"))

    def capture(run: Any, device: torch.device) -> Any:
        if fault == "fails half-way":  # with gradients, and what was watched, that a graph never computed
            stage = ours.stage
            loss, _ = stage.step.discriminator_loss(torch.full((8, 1, 8, 8), torch.nan), torch.arange(8))
            stage.discriminator_engine.backward(loss)
            stage.nonfinite.loss("loss of the discriminator", loss)
        if fault != "wrong":
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        return lambda: ours.stage.ema.steps.add_(1000)

    monkeypatch.setattr(captured_step, "capture", capture)
    captured, eager = CapturedStep(ours.stage), CapturedStep(theirs.stage)
    run_steps(ours, captured, WARM_UP_STEPS + 3)
    eager.refusal = "not to be captured"
    run_steps(theirs, eager, WARM_UP_STEPS + 3)
    assert not captured.captured and captured.refusal is not None
    assert ("differs from an eager one" if fault == "wrong" else "when stream is capturing") in captured.refusal
    assert "\n" not in captured.refusal
    mine, its = state(ours), state(theirs)
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    ours.raise_if_nonfinite()


def test_what_cannot_be_captured_says_why(tmp_path: Path) -> None:
    trainer = make("dcgan", tmp_path)
    assert unsupported_reason(trainer.stage) is None
    trainer.stage.world = processes.ProcessGroup(0, 2, torch.device("cpu"), "torch", "test")
    assert unsupported_reason(trainer.stage) == "gradients are averaged between ranks"
    trainer.stage.world = processes.ProcessGroup(0, 1, torch.device("cpu"), "deepspeed", "test")
    assert unsupported_reason(trainer.stage) is None
    trainer.stage.config = replace(trainer.config, system={"zero": 1})
    assert "DeepSpeed" in (unsupported_reason(trainer.stage) or "")


def trainer_that_captures(
    run: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, resume: checkpoint.Checkpoint | None = None
) -> Trainer:
    """Of a short run that grows from 4 to 8 px; a recorded step stands in for a GPU's graph."""
    monkeypatch.setattr(capturing, "_DEVICES", ("cuda", "cpu"))
    line = f"--variant pggan --latent 8 --batch 8 {SMALL['pggan']} --compile off --capture --samples 4 --kimg 0.6"
    config = parse([*line.split(), *flags]).config
    run.mkdir(exist_ok=True)
    world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
    return Trainer(config, "pggan", world, data.open_source("digits", 8), run, resume)


def test_a_run_captures_each_phase_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of a run whose steps are not captured; fades and growths have steps of their own."""
    theirs = trainer_that_captures(tmp_path / "theirs", monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr(captured_step, "WARM_UP_STEPS", 10**9)
        theirs.run()
    ours = trainer_that_captures(tmp_path / "ours", monkeypatch, "--log-kimg", "0.024")
    ours.run()
    mine, its = state(ours), state(theirs)
    assert not [name for name in mine if name != "meters" and not torch.equal(mine[name], its[name])]
    rows = [json.loads(line) for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    assert {row["form"] for row in rows} == {"eager", "eager, captured"}
    assert {row["resolution"] for row in rows if row["form"] == "eager, captured"} == {4, 8}


@pytest.mark.slow
def test_a_resumed_run_that_captures_has_the_bits_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer_that_captures(tmp_path / "whole", monkeypatch)
    for _ in range(12):
        whole.train_step()
    first = trainer_that_captures(tmp_path / "first", monkeypatch)
    for _ in range(7):
        first.train_step()
    assert first.capturing.form(first.stage) == "eager, captured"
    first.save()
    stored = checkpoint.read(tmp_path / "first", "--resume")
    second = trainer_that_captures(tmp_path / "first", monkeypatch, resume=stored)
    for _ in range(5):
        second.train_step()
    assert second.capturing.form(second.stage) == "eager, captured"
    mine, its = state(whole), state(second)
    assert not [name for name in mine if not torch.equal(mine[name], its[name])]


def test_capture_without_a_gpu_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_that_captures(tmp_path, monkeypatch)
    monkeypatch.setattr(capturing, "_DEVICES", ("cuda",))
    trainer.train_step()
    assert trainer.capturing.notes(8) == ["--capture: off, a cpu has no graphs"]
    trainer.train_step()
    assert trainer.capturing.notes(16) == [] and trainer.capturing.form(trainer.stage) == "eager"


@pytest.mark.slow
def test_deepspeeds_engine_is_captured_too(tmp_path: Path) -> None:
    cases = []
    for name, accumulation in (("dcgan", 1), ("wgan-gp", 2)):
        flags = f"--latent 8 --batch 8 {SMALL['dcgan']} --capture --compile off --accumulation {accumulation}"
        cases.append({"name": f"{name}-{accumulation}", "variant": name, "flags": flags.split()})
    ranks.launch(Path(ranks.__file__).parent / "captured_steps.py", cases, tmp_path, 1, engine="deepspeed")
    for case in cases:
        found = json.loads((tmp_path / f"{case['name']}.json").read_text())
        assert found == {"engine": "deepspeed", "form": "eager, captured", "differences": []}
