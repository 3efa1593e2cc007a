"""Builds what a configuration asks for: the step with its loss and regularizer, optimizers, engine settings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from fastgan import objectives
from fastgan.config import Config, Networks, active_ranks, batch_at
from fastgan.config.growth import stages_of
from fastgan.config.rules import SECOND_ORDER
from fastgan.errors import ArgumentError
from fastgan.models import MODELS
from fastgan.objectives import LOSSES
from fastgan.training.augmentation import Adaptive, Augmentation, Differentiable
from fastgan.training.distributed.deepspeed_engine import deepspeed_config
from fastgan.training.distributed.engine import OptimizerFactory
from fastgan.training.loss_scale import LossScale
from fastgan.training.step import Regularizer, Step


def network_values(networks: Networks, *, resolution: int, channels: int, num_classes: int) -> dict[str, Any]:
    """What `models.build` needs to make the networks of a stage; stored in checkpoints."""
    values = dataclasses.asdict(networks)
    values["num_classes"] = num_classes if values.pop("conditional") else 0
    return {**values, "resolution": resolution, "channels": channels}


def engine_settings(config: Config, resolution: int, world_size: int, *, overlap: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage; `validate_stages` has passed.

    Raises:
        ArgumentError: the user's file does not fit.
    """
    s, system = config.schedule, config.system
    batch = batch_at(s, resolution)
    active = active_ranks(batch, world_size, s.accumulation)
    assert active is not None
    return deepspeed_config(
        system.deepspeed_config,
        zero=system.zero,
        micro_batch=batch // (active * s.accumulation),
        accumulation=s.accumulation,
        world=world_size,
        overlap=overlap,
    )


def validate_stages(config: Config, world_size: int) -> None:
    """Refuse an unknown model or loss, a batch that does not divide over its ranks, and DeepSpeed settings that misfit.

    Raises:
        ArgumentError: naming the model, the loss, the batch or the setting.
    """
    s, system = config.schedule, config.system
    for flag, name, known in (("--model", config.networks.model, MODELS), ("--loss", config.objective.loss, LOSSES)):
        if name not in known:
            raise ArgumentError(flag, name, f"must be {', '.join(known)} or registered before")
    parts = world_size * s.accumulation
    for stage in stages_of(config):
        batch = batch_at(s, stage.resolution)
        active = active_ranks(batch, world_size, s.accumulation)
        if active is None:
            ranks = f"{world_size} ranks x {s.accumulation} micro-batches"
            problem = f"must be a multiple of {parts} at {stage.resolution} px; {ranks}"
            raise ArgumentError("--batch", batch, problem)
        if active < world_size and system.sync_bn:
            problem = f"it needs images for every rank, and the batch of {batch} at {stage.resolution} px is too small"
            raise ArgumentError("--sync-bn", True, problem)
        engine_settings(config, stage.resolution, world_size)


def build_augmentation(config: Config, channels: int, device: torch.device) -> Augmentation | None:
    """What augments images of so many channels, on `device`."""
    d, kimg, seed = config.data, config.schedule.kimg, config.run.seed
    if d.augment == "ada":
        rise = min(500.0, kimg / 5.0) if d.augment_kimg is None else d.augment_kimg
        return Adaptive(channels, seed, target=d.augment_target, kimg=rise).to(device)
    return Differentiable(channels, seed).to(device) if d.augment == "diffaugment" else None


def build_step(
    config: Config,
    generator: nn.Module,
    discriminator: nn.Module,
    num_classes: int,
    augmentation: Augmentation | None = None,
) -> Step:
    """The step that `config` asks for on two networks; `augmentation`: see `build_augmentation`.

    Raises:
        ValueError: the precision is "auto", which `precision.resolve` turns into another.
    """
    o = config.objective
    loss = objectives.LOSSES[o.loss]
    if o.loss == "least-squares":
        loss = objectives.least_squares(o.label_fake, o.label_real, o.label_generator)
    penalty: tuple[float, Regularizer] | None = None
    if o.regularizer == "gradient-penalty":
        penalty = (o.penalty_weight, objectives.gradient_penalty)
    elif o.regularizer == "wasserstein-divergence":
        divergence = functools.partial(objectives.wasserstein_divergence, k=o.divergence_k, p=o.divergence_p)
        penalty = (1.0, divergence)
    elif o.regularizer == "zero-centered":
        penalty = (o.penalty_weight, objectives.real_penalty)
    elif o.regularizer == "zero-centered-both":
        penalty = (o.penalty_weight, objectives.both_penalty)
    if config.system.precision == "auto":
        raise ValueError("precision must be resolved, got 'auto': see fastgan.training.precision")
    return Step(
        generator,
        discriminator,
        loss=loss,
        penalty=penalty,
        penalty_every=o.penalty_every,
        penalty_sigma=o.penalty_sigma if o.penalty_method == "finite-difference" else None,
        drift=o.drift,
        num_classes=num_classes if config.networks.conditional else 0,
        seed=config.run.seed,
        precision=config.system.precision,
        augmentation=augmentation,
    )


def rates(config: Config, images: int, resolution: int) -> tuple[float, float]:
    """Learning rates of the generator and the discriminator for the step after `images`, at `resolution`."""
    o, total = config.optimizer, 1000 * config.schedule.kimg
    left = max(0.0, total - images) / total
    factor = min(1.0, left / o.lr_decay) if o.lr_decay else 1.0
    reached = [at for at in o.lr_factor_at if at <= resolution]
    factor *= o.lr_factor_at[max(reached)] if reached else 1.0
    return o.lr_g * factor, o.lr_d * factor * _lazy_correction(config)


def _lazy_correction(config: Config) -> float:
    """k / (k + 1) for k discriminator steps and one for the penalty alone (Karras et al. 2020, appendix B); else 1.

    Rates times this, and coefficients to the power of this, move weights and averages in k + 1 steps as far as in k.
    """
    o = config.objective
    lazy = o.regularizer in SECOND_ORDER and o.penalty_every > 1
    return o.penalty_every / (o.penalty_every + 1) if lazy else 1.0


def penalty_is_due(config: Config, images: int, batch: int) -> bool:
    """Whether a penalty step follows the discriminator's step on the `batch` images after `images`.

    It depends on the images seen alone, so that a run that is resumed penalizes at the same steps.
    """
    o = config.objective
    if o.regularizer not in SECOND_ORDER or o.penalty_every == 1:
        return False
    every = o.penalty_every * batch
    return (images + batch) // every > images // every


def optimizer_factory(config: Config, *, discriminator: bool, scale: LossScale | None = None) -> OptimizerFactory:
    """A function from parameters to the optimizer of one network. Fused forms do not synchronize with the host.

    With a `scale` of the loss, it divides gradients by that and skips updates that overflowed.
    """
    o = config.optimizer
    lr = o.lr_d if discriminator else o.lr_g
    correction = _lazy_correction(config) if discriminator else 1.0
    lr, beta1, beta2 = lr * correction, o.beta1**correction, o.beta2**correction

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer
        if o.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, lr=lr, betas=(beta1, beta2), eps=1e-8, fused=True)
        elif o.optimizer == "rmsprop":
            optimizer = torch.optim.RMSprop(parameters, lr=lr, alpha=beta2)
        else:
            optimizer = torch.optim.SGD(parameters, lr=lr, momentum=beta1, fused=True)
        if discriminator and config.objective.regularizer == "weight-clipping":
            objectives.clip_weights(optimizer, config.objective.clip)
        if scale is not None:
            scale.attach(optimizer)
        return optimizer

    return make


def memory_format(config: Config) -> torch.memory_format:
    """Of images and of the weights of convolutions."""
    # Measured on two CPU cores over the digits presets: channels_last takes 0.8 to 1.0 times contiguous's time.
    system = config.system
    contiguous = system.memory_format == "contiguous" or (system.memory_format == "auto" and system.device == "mps")
    return torch.contiguous_format if contiguous else torch.channels_last
