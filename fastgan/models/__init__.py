"""Networks: a generator and a discriminator for each name, built from plain values."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from torch import nn

from fastgan.models import dcgan, mlp, pggan, sagan

MODELS: dict[str, ModuleType] = {"mlp": mlp, "dcgan": dcgan, "sagan": sagan, "pggan": pggan}


def _build(cls: type[nn.Module], values: dict[str, Any]) -> nn.Module:
    wanted = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in values.items() if name in wanted})


def build(model: str, *, norm_g: str = "batch", norm_d: str = "batch", **values: Any) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of the named model, on the CPU, initialized from torch's global generator.

    Args:
        model: mlp, dcgan, sagan or pggan.
        norm_g, norm_d: batch or none, for the models that offer the choice.
        values: `resolution`, `channels`, `latent`, `width`, ...; each network takes the ones in its signature.

    Raises:
        KeyError: no such model.
    """
    module = MODELS[model]
    generator = _build(module.Generator, {**values, "norm": norm_g})
    discriminator = _build(module.Discriminator, {**values, "norm": norm_d})
    return generator, discriminator
