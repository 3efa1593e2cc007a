"""Checkpoints of a run of many ranks: one rank writes, all of them learn how it went; and what a run may go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan import checkpoint
from fastgan.checkpoint import Checkpoint
from fastgan.config import Config, read_yaml
from fastgan.config.stages import Stage, stage_at
from fastgan.errors import ArgumentError
from fastgan.training.distributed.process_group import ProcessGroup


def random_state(world: ProcessGroup) -> dict[str, Tensor]:
    """The state of every rank's own generator, "rankN" -> uint8; a collective."""
    return {f"rank{i}": state for i, state in enumerate(world.gather(torch.get_rng_state()))}


def write(
    world: ProcessGroup,
    run: Path,
    keep: int,
    meta: dict[str, Any],
    ema: dict[str, Tensor],
    training: dict[str, dict[str, Tensor]],
    last_good: Path | None,
) -> Path:
    """Rank 0 writes what it was given; a collective, and every rank's `last_good` from then on.

    Raises:
        ArgumentError: on every rank, if it could not be written.
    """
    failure = None
    if world.main:
        try:
            last_good = checkpoint.save(run, meta, ema, training, keep)
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


def settings(config: Config) -> dict[str, Any]:
    """What a checkpoint keeps of its run's settings: those that `check` or the cut of the batches go by."""
    return {
        "accumulation": config.schedule.accumulation,
        "seed": config.run.seed,
        "optimizer": config.optimizer.optimizer,
    }


def _optimizer(resume: Checkpoint) -> str | None:
    """The optimizer whose state a checkpoint has, as it says itself or, if it is older than that, its run."""
    if "optimizer" in resume.meta:
        return str(resume.meta["optimizer"])
    file = resume.path.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        return None
    section = read_yaml(file, "--resume").get("optimizer")
    return section.get("optimizer") if isinstance(section, dict) else None


def check(resume: Checkpoint, config: Config, networks: dict[str, Any], stages: list[Stage]) -> None:
    """Refuse a checkpoint that a run of `config` cannot go on from; `networks` are the run's at its resolution.

    Raises:
        ArgumentError: networks, stages, seed or optimizer are not the checkpoint's.
    """
    meta = resume.meta
    for key, value in meta["networks"].items():
        if networks.get(key) != value:
            raise ArgumentError(
                f"--{key.replace('_', '-')}", networks.get(key), f"the checkpoint {resume.path} has {value!r}"
            )
    if meta["resolution"] not in [stage.resolution for stage in stages]:
        raise ArgumentError(
            "--resolution", config.schedule.resolution, f"the checkpoint {resume.path} is at {meta['resolution']} px"
        )
    if stage_at(stages, meta["images"]).resolution < meta["resolution"]:
        raise ArgumentError(
            "--kimg",
            config.schedule.kimg,
            f"it would move the growth of a run that is at {meta['resolution']} px; give the old run's stages too, "
            "with --fade-kimg and --stable-kimg",
        )
    if meta["seed"] != config.run.seed:
        raise ArgumentError("--seed", config.run.seed, f"the checkpoint {resume.path} has {meta['seed']}")
    was, asked = _optimizer(resume), config.optimizer.optimizer
    if was not in (None, asked):
        raise ArgumentError("--optimizer", asked, f"the checkpoint {resume.path} has the state of {was}")
