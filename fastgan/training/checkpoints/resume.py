"""What a run may be resumed with: refusals, and the cut of batches on another number of ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgan.checkpoint import Checkpoint
from fastgan.config import Config, Schedule, batch_at
from fastgan.config.files import read_yaml
from fastgan.config.growth import Stage, stage_at
from fastgan.errors import ArgumentError
from fastgan.models import misfit


def _optimizer(resume: Checkpoint) -> str | None:
    """The optimizer whose state a checkpoint has; old checkpoints leave that to the config.yaml of their run."""
    if "optimizer" in resume.meta:
        return str(resume.meta["optimizer"])
    file = resume.path.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        return None
    section = read_yaml(file, "--resume").get("optimizer")
    return section.get("optimizer") if isinstance(section, dict) else None


def validate_resume(resume: Checkpoint, config: Config, networks: dict[str, Any], stages: list[Stage]) -> None:
    """Refuse a checkpoint that a run of `config` cannot resume from.

    Args:
        resume: the checkpoint.
        config, stages: of the run.
        networks: the values that `models.build` takes for the run at the resolution of the checkpoint.

    Raises:
        ArgumentError: networks, stages, seed or optimizer differ from the checkpoint's.
    """
    meta = resume.meta
    for key, value in meta["networks"].items():
        if networks.get(key) != value:
            raise ArgumentError(
                f"--{key.replace('_', '-')}",
                networks.get(key),
                f"must be {value!r}; the checkpoint {resume.path} has it",
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
        raise ArgumentError("--seed", config.run.seed, f"must be {meta['seed']}; the checkpoint {resume.path} has it")
    was, requested = _optimizer(resume), config.optimizer.optimizer
    if was not in (None, requested):
        raise ArgumentError("--optimizer", requested, f"must be {was}; the checkpoint {resume.path} has its state")


def require_fitting(stored: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by group, if they are those of its networks; nothing is built for the comparison.

    Raises:
        ArgumentError: a weight is missing, has another shape, or is not finite.
    """
    groups = {"ema": stored.generator(), **stored.training()}
    for group in ("ema", "generator", "discriminator"):
        problem = misfit(stored.meta["networks"], groups.get(group, {}), discriminator=group == "discriminator")
        if problem:
            file = "generator.safetensors" if group == "ema" else "training.safetensors"
            raise ArgumentError(stored.flag, str(stored.path), f"{file} does not fit: {problem}")
    for group, network in (("optimizer_g", "generator"), ("optimizer_d", "discriminator")):
        problem = _optimizer_misfit(groups.get(group, {}), groups[network])
        if problem:
            raise ArgumentError(stored.flag, str(stored.path), f"training.safetensors does not fit: {group}:{problem}")
    return groups


def _optimizer_misfit(state: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """The first part of an optimizer's state, by "weight/quantity", that is of no weight or incomplete."""
    quantities: dict[str, set[str]] = {}
    for name, tensor in state.items():
        weight, _, quantity = name.rpartition("/")
        expected = 1 if quantity == "step" else weights[weight].numel() if weight in weights else -1
        if tensor.numel() != expected or weight not in weights:
            return f"{name[:60]} is of no weight"
        quantities.setdefault(weight, set()).add(quantity)
    every = set().union(*quantities.values())
    return next((f"{weight[:60]} is incomplete" for weight, found in quantities.items() if found != every), "")


def accumulation_for(parts: int, world: int, schedule: Schedule, resolutions: list[int]) -> int | None:
    """Micro-batches with which `world` ranks cut the global batch into `parts`, or as near to that as it divides.

    The batch, and with it the result, then does not depend on the number of ranks: one rank more takes a share that
    accumulation took before.

    Returns:
        None where the batch does not divide over so many ranks at all.
    """
    batches = [batch_at(schedule, resolution) for resolution in resolutions]
    able = [a for a in range(1, min(batches) // world + 1) if all(batch % (a * world) == 0 for batch in batches)]
    return min(able, key=lambda a: (abs(a * world - parts), -a), default=None)
