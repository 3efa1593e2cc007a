"""The networks: a generator and a discriminator for each model, built from plain values."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from torch import nn

from fastgan.models import dcgan, mlp, pggan, r3gan, sagan

MODELS: dict[str, ModuleType] = {"mlp": mlp, "dcgan": dcgan, "sagan": sagan, "pggan": pggan, "r3gan": r3gan}


def _build(cls: type[nn.Module], values: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in values.items() if name in parameters})


def build(model: str, *, norm_g: str = "batch", norm_d: str = "batch", **values: Any) -> tuple[nn.Module, nn.Module]:
    """Build a model on the CPU, with weights from torch's global random generator.

    Args:
        model: mlp, dcgan, sagan, pggan or r3gan.
        norm_g: batch or none, for generators with that choice.
        norm_d: as `norm_g`, for discriminators.
        values: `resolution`, `channels`, `latent`, `width`, ...; each network gets those in its signature.

    Returns:
        The generator and the discriminator.

    Raises:
        KeyError: an unknown model.
    """
    module = MODELS[model]
    generator = _build(module.Generator, {**values, "norm": norm_g})
    discriminator = _build(module.Discriminator, {**values, "norm": norm_d})
    return generator, discriminator
