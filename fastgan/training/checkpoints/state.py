"""What of a running trainer goes into a checkpoint, and how several ranks write one.

`Trainer.save` writes one, a trainer that resumes restores it; the layout on disk is in fastgan/checkpoint.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgan import __version__, checkpoint
from fastgan.checkpoint import Checkpoint
from fastgan.errors import ArgumentError, printable
from fastgan.ops import qualification
from fastgan.training.checkpoints.resume import require_fitting, validate_resume
from fastgan.training.observability.rank_log import LOGGER
from fastgan.training.observability.runaway import RunawayDetector
from fastgan.utils.text import first_line

if TYPE_CHECKING:
    from fastgan.training.trainer import Trainer


def tensors(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Weights, optimizer state, and of every rank its random state and meters, by group; a collective."""
    stage = trainer.stage
    random = trainer.world.gather(torch.get_rng_state())
    augmentation = stage.step.augmentation
    totals = trainer.meters.totals(stage.step.metrics, trainer.world.device)
    meters = trainer.world.gather(totals.cpu())
    return {
        "generator": dict(stage.step.generator.state_dict()),
        "discriminator": dict(stage.step.discriminator.state_dict()),
        "optimizer_g": stage.generator_engine.state(),
        "optimizer_d": stage.discriminator_engine.state(),
        "random": {f"rank{i}": state for i, state in enumerate(random)},
        "loss_scale": {} if trainer.scales is None else trainer.scales.state(),
        **({} if augmentation is None else {"augmentation": dict(augmentation.state_dict())}),
        "meters": {f"rank{i}": totals for i, totals in enumerate(meters)},
    }


def load_random(resume: Checkpoint, training: dict[str, dict[str, Tensor]], rank: int) -> None:
    """Restore torch's random state of a rank.

    Raises:
        ArgumentError: there is none, or it is of another kind.
    """
    state = training.get("random", {}).get(f"rank{rank}")
    current = torch.get_rng_state()
    if state is None or state.dtype != current.dtype or state.shape != current.shape:
        problem = f"training.safetensors does not fit: random:rank{rank} is no state of this torch"
        raise ArgumentError(resume.flag, str(resume.path), problem)
    torch.set_rng_state(state)


def load_runaway(detector: RunawayDetector, resume: Checkpoint) -> None:
    """Restore what the detector of leaps had seen.

    Raises:
        ArgumentError: the values were edited.
    """
    try:
        detector.load(resume.meta["runaway"])
    except ValueError as error:
        problem = f"its checkpoint.json is damaged: runaway: {first_line(error)}"
        raise ArgumentError(resume.flag, str(resume.path), problem) from None


def load_meters(trainer: Trainer, stored: dict[str, Tensor]) -> None:
    """Continue the interval between two rows of metrics.jsonl that a checkpoint was written in.

    Args:
        trainer: at the stage of the checkpoint.
        stored: the group "meters" of the checkpoint; empty in old ones.
    """
    world, names = trainer.world, trainer.stage.step.metrics
    parts = [part for _, part in sorted(stored.items())]
    if not parts or any(part.shape != (2, len(names)) for part in parts):
        return
    if len(parts) == world.size:
        own = stored[f"rank{world.rank}"]
    else:  # another number of ranks: the sums of all are what a row is made from
        own = torch.stack(parts).sum(0) if world.main else torch.zeros_like(parts[0])
    trainer.meters.load(names, own.to(world.device))


def description(trainer: Trainer) -> dict[str, Any]:
    """Plain values: where the run stands, and the settings that a resume is checked against."""
    config, stage = trainer.config, trainer.stage
    return {
        "version": __version__,
        "variant": trainer.variant,
        "networks": stage.networks,
        "classes": [printable(name)[:200] for name in trainer.source.classes] if stage.networks["num_classes"] else [],
        "images": trainer.images,
        "steps": trainer.steps,
        "ema_steps": int(stage.ema.steps.item()),
        "resolution": stage.resolution,
        "compiled": stage.programs is not None,
        "world_size": trainer.world.size,
        "accumulation": config.schedule.accumulation,
        "seed": config.run.seed,
        "optimizer": config.optimizer.optimizer,
        "runaway": trainer.runaway.state(),
        "data": trainer.feed.pipeline.state_dict(),
        "implementations": qualification.record(trainer.world.device),
    }


def write(trainer: Trainer) -> Path:
    """Write a checkpoint on rank 0; a collective.

    Returns:
        Its folder, on every rank.

    Raises:
        ArgumentError: on every rank, if it could not be written.
    """
    world, run, last_good = trainer.world, trainer.run_path, trainer.last_good
    stored, meta, ema = tensors(trainer), description(trainer), dict(trainer.stage.ema.module.state_dict())
    differing = qualification.conflict(world.gather(meta["implementations"]))
    if differing is not None:
        LOGGER.warning(differing)
    failure = None
    if world.main:
        try:
            last_good = checkpoint.save(run, meta, ema, stored, trainer.config.run.keep)
        except OSError as error:
            failure = str(error)
    failure, last_good = world.broadcast((failure, last_good))
    if failure is not None:
        good = f"the last good one is {last_good}" if last_good else "there is none yet"
        raise ArgumentError("--out", str(run), f"the checkpoint could not be written ({failure}); {good}")
    assert last_good is not None
    if world.heartbeat is not None:
        world.heartbeat.last_good = last_good
    return last_good


def restore(trainer: Trainer, resume: Checkpoint, networks: dict[str, Any]) -> None:
    """Put a new trainer where `resume` was written.

    Args:
        trainer: has no stage yet.
        resume: the checkpoint.
        networks: as for `validate_resume`.

    Raises:
        ArgumentError: the checkpoint is of another run, or it was edited.
    """
    meta = resume.meta
    validate_resume(resume, trainer.config, networks, trainer.stages)
    trainer.feed.pipeline.load_state_dict(meta["data"])
    trainer.images, trainer.steps = meta["images"], meta["steps"]
    trainer.compilation.resumes_compiled = meta.get("compiled", False)
    training = require_fitting(resume)
    trainer.enter(meta["resolution"], training, meta["ema_steps"])
    trainer.stage.generator_engine.load_state(training.get("optimizer_g", {}))
    trainer.stage.discriminator_engine.load_state(training.get("optimizer_d", {}))
    if trainer.scales is not None:
        trainer.scales.load_state(training.get("loss_scale", {}))
    if "runaway" in meta:
        load_runaway(trainer.runaway, resume)
    load_meters(trainer, training.get("meters", {}))
    if meta["world_size"] == trainer.world.size:
        load_random(resume, training, trainer.world.rank)
    trainer.last_good = resume.path
