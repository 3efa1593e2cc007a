"""What of a running trainer goes into a checkpoint, and how several ranks write one.

`Trainer.save` and its counterpart `Trainer._restore` use these; the layout on disk is in fastgan/checkpoint.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgan import __version__, checkpoint
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.training.trainer import Trainer


def tensors(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Weights, optimizer state and the random state of every rank, by group; a collective."""
    stage = trainer.stage
    random = trainer.world.gather(torch.get_rng_state())
    return {
        "generator": dict(stage.step.generator.state_dict()),
        "discriminator": dict(stage.step.discriminator.state_dict()),
        "optimizer_g": stage.generator_engine.state(),
        "optimizer_d": stage.discriminator_engine.state(),
        "random": {f"rank{i}": state for i, state in enumerate(random)},
    }


def description(trainer: Trainer) -> dict[str, Any]:
    """Plain values: where the run stands, and the settings that a resume is checked against."""
    config, stage = trainer.config, trainer.stage
    return {
        "version": __version__,
        "variant": trainer.variant,
        "networks": stage.networks,
        "classes": list(trainer.source.classes) if stage.networks["num_classes"] else [],
        "images": trainer.images,
        "steps": trainer.steps,
        "ema_steps": int(stage.ema.steps.item()),
        "resolution": stage.resolution,
        "world_size": trainer.world.size,
        "accumulation": config.schedule.accumulation,
        "seed": config.run.seed,
        "optimizer": config.optimizer.optimizer,
        "data": trainer.feed.pipeline.state_dict(),
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
