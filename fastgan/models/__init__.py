"""The networks: a generator and a discriminator for each model, built from plain values."""

from __future__ import annotations

import inspect
import re
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastgan.models import dcgan, mlp, pggan, r3gan, sagan
from fastgan.models.fitting import difference
from fastgan.utils.stored_values import networks_problem

__all__ = ["MODELS", "build", "register"]

MODELS: dict[str, ModuleType | SimpleNamespace] = {
    "mlp": mlp,
    "dcgan": dcgan,
    "sagan": sagan,
    "pggan": pggan,
    "r3gan": r3gan,
}
_OWN = frozenset(MODELS)


def register(name: str, generator: type[nn.Module], discriminator: type[nn.Module]) -> None:
    """Make networks of your own a model, in this process: `train(..., networks={"model": name})`, `fastgan.load(run)`.

    A file names its model and never its code: a process that loads what was trained must register the model first.

    Args:
        name: up to 60 letters, digits, - and _; not that of a model of fastgan. Another one replaces the one before.
        generator: takes arguments of `build` by name, those in its signature: `resolution`, `channels`, `latent`,
            `width`, `num_classes`, ... An instance has `latent`, the size of its latent vector, as an attribute, and
            maps latents [N, latent] and labels (int64 [N] or None) to images [N, C, R, R] in [-1, 1].
        discriminator: likewise; maps images and labels to scores [N].

    Raises:
        ValueError: the name cannot be used.
    """
    if not re.fullmatch(r"[\w-]{1,60}", name) or name in _OWN:
        raise ValueError(f"name must be 1 to 60 letters and digits that name no model of fastgan, got {name!r}")
    MODELS[name] = SimpleNamespace(Generator=generator, Discriminator=discriminator)


def _build(cls: type[nn.Module], values: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in values.items() if name in parameters})


def load_generator(networks: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Build a generator and load its weights, which may come from others.

    Args:
        networks: arguments of `build`.
        weights: its state dict.

    Raises:
        ValueError: a value of `networks` or the shape of a weight is wrong; checked before memory is allocated.
    """
    problem = networks_problem(networks) or misfit(networks, weights, discriminator=False)
    if problem:
        raise ValueError(problem)
    generator = build_one(False, **networks)
    generator.load_state_dict(weights)
    return generator


def misfit(networks: dict[str, Any], weights: dict[str, Tensor], *, discriminator: bool) -> str:
    """The first weight that a network does not have or that has another shape; "" if all fit. Allocates nothing."""
    if networks["model"] not in MODELS:
        known = ", ".join(MODELS)
        return f"its model is {networks['model']!r}, which is none of {known}; fastgan.models.register adds your own"
    return difference(lambda: build_one(discriminator, **networks), weights)


def build(model: str, *, norm_g: str = "batch", norm_d: str = "batch", **values: Any) -> tuple[nn.Module, nn.Module]:
    """Build a model on the CPU, with weights from torch's global random generator.

    Args:
        model: mlp, dcgan, sagan, pggan, r3gan or a name of `register`.
        norm_g: batch or none, for generators with that choice.
        norm_d: as `norm_g`, for discriminators.
        values: `resolution`, `channels`, `latent`, `width`, ...; each network gets those in its signature.

    Returns:
        The generator and the discriminator.

    Raises:
        KeyError: an unknown model.
    """
    values = {"model": model, "norm_g": norm_g, "norm_d": norm_d, **values}
    return build_one(False, **values), build_one(True, **values)


def build_one(
    discriminator: bool, *, model: str, norm_g: str = "batch", norm_d: str = "batch", **values: Any
) -> nn.Module:
    """The discriminator or the generator of `build`, without the other one."""
    module = MODELS[model]
    if discriminator:
        return _build(module.Discriminator, {**values, "norm": norm_d})
    return _build(module.Generator, {**values, "norm": norm_g})
