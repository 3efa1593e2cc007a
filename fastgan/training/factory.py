"""What a configuration asks for: stages, the step and its losses, optimizers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from fastgan import objectives
from fastgan.config import Config, Networks, active_ranks, batch_at
from fastgan.config.stages import Stage, stages
from fastgan.errors import ArgumentError
from fastgan.training.distributed.deepspeed_engine import deepspeed_config
from fastgan.training.distributed.engine import OptimizerFactory
from fastgan.training.step import Regularizer, Step


def network_values(networks: Networks, *, resolution: int, channels: int, num_classes: int) -> dict[str, Any]:
    """What `models.build` needs to make the networks of a stage; stored in checkpoints."""
    values = dataclasses.asdict(networks)
    values["num_classes"] = num_classes if values.pop("conditional") else 0
    return {**values, "resolution": resolution, "channels": channels}


def plan(config: Config) -> list[Stage]:
    """The stages of a run."""
    s = config.schedule
    return stages(
        s.resolution,
        s.kimg,
        progressive=config.networks.model == "pggan",
        fade_kimg=s.fade_kimg,
        stable_kimg=s.stable_kimg,
        grown_at=s.grown_at,
    )


def ends_early(config: Config) -> str | None:
    """A warning to a run that is over before it has grown to the resolution that was asked for."""
    s, reached = config.schedule, plan(config)[-1].resolution
    if reached == s.resolution:
        return None
    return f"warning: {s.kimg:g} kimg end at {reached} px; raise --kimg, or lower --fade-kimg, --stable-kimg"


def engine_settings(config: Config, resolution: int, world_size: int, *, overlap: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage whose batch can be shared.

    Raises:
        ArgumentError: the user's file does not fit.
    """
    s, system = config.schedule, config.system
    batch = batch_at(s, resolution)
    working = active_ranks(batch, world_size, s.accumulation)
    assert working is not None
    return deepspeed_config(
        system.deepspeed_config,
        zero=system.zero,
        micro_batch=batch // (working * s.accumulation),
        accumulation=s.accumulation,
        world=world_size,
        overlap=overlap,
    )


def check_stages(config: Config, world_size: int) -> None:
    """Every stage's batch must divide over the ranks that share it, and DeepSpeed's file must fit every stage.

    Raises:
        ArgumentError: it does not.
    """
    s, system = config.schedule, config.system
    parts = world_size * s.accumulation
    for stage in plan(config):
        batch = batch_at(s, stage.resolution)
        working = active_ranks(batch, world_size, s.accumulation)
        if working is None:
            raise ArgumentError(
                "--batch",
                batch,
                f"at {stage.resolution} px it may be a multiple of {parts} "
                f"({world_size} ranks x {s.accumulation} micro-batches)",
            )
        if working < world_size and system.sync_bn:
            raise ArgumentError(
                "--sync-bn", True, f"it needs a batch for every rank, and {batch} at {stage.resolution} px is too small"
            )
        engine_settings(config, stage.resolution, world_size)


def build_step(config: Config, generator: nn.Module, discriminator: nn.Module, num_classes: int) -> Step:
    """The step that `config` asks for on two networks."""
    o = config.objective
    loss = {
        "minimax": objectives.minimax(),
        "minimax-saturating": objectives.minimax(saturating=True),
        "least-squares": objectives.least_squares(o.label_fake, o.label_real, o.label_generator),
        "wasserstein": objectives.wasserstein(),
        "hinge": objectives.hinge(),
    }[o.loss]
    penalty: tuple[float, Regularizer] | None = None
    if o.regularizer == "gradient-penalty":
        penalty = (o.penalty_weight, objectives.gradient_penalty)
    elif o.regularizer == "wasserstein-divergence":
        divergence = functools.partial(objectives.wasserstein_divergence, k=o.divergence_k, p=o.divergence_p)
        penalty = (1.0, divergence)
    elif o.regularizer == "zero-centered":
        penalty = (o.penalty_weight, objectives.real_penalty)
    precision = config.system.precision
    return Step(
        generator,
        discriminator,
        loss=loss,
        penalty=penalty,
        drift=o.drift,
        num_classes=num_classes if config.networks.conditional else 0,
        seed=config.run.seed,
        precision=precision,
        penalty_precision="fp32" if config.system.penalty_precision == "fp32" else precision,
    )


def rates(config: Config, images: int) -> tuple[float, float]:
    """Learning rates of the generator and the discriminator for the step after `images`."""
    o, total = config.optimizer, 1000 * config.schedule.kimg
    left = max(0.0, total - images) / total
    factor = min(1.0, left / o.lr_decay) if o.lr_decay else 1.0
    return o.lr_g * factor, o.lr_d * factor


def optimizer_factory(config: Config, *, discriminator: bool) -> OptimizerFactory:
    """Makes the optimizer of one network from its parameters; fused forms, which read nothing back to the host."""
    o = config.optimizer
    lr = o.lr_d if discriminator else o.lr_g

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer
        if o.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, lr=lr, betas=(o.beta1, o.beta2), eps=1e-8, fused=True)
        elif o.optimizer == "rmsprop":
            optimizer = torch.optim.RMSprop(parameters, lr=lr, alpha=o.beta2)
        else:
            optimizer = torch.optim.SGD(parameters, lr=lr, momentum=o.beta1, fused=True)
        if discriminator and config.objective.regularizer == "weight-clipping":
            objectives.clip_weights(optimizer, config.objective.clip)
        return optimizer

    return make


def intervals(config: Config) -> dict[str, float]:
    """After how many thousand images a run does each thing again."""
    run, kimg = config.run, config.schedule.kimg
    every = run.checkpoint_kimg or min(kimg / 20, 200.0)
    return {
        "checkpoint": every,
        "sample": run.sample_kimg or every,
        "log": run.log_kimg or min(kimg / 100, 4.0),
        "evaluate": run.evaluate_kimg or kimg,
    }
