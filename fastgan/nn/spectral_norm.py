"""Spectral norm (Miyato et al. 2018) whose modules can be pickled."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize


def spectral_norm(module: nn.Module) -> nn.Module:
    """`torch.nn.utils.parametrizations.spectral_norm` of `module.weight`; unlike there, the module can be pickled."""
    return _make_picklable(parametrizations.spectral_norm(module))


def _make_picklable(module: nn.Module) -> nn.Module:
    # torch gives every parametrized module a class of its own, which pickle cannot find by name.
    type(module).__reduce__ = _reduce  # type: ignore[method-assign,assignment]
    return module


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    return _restore, (parametrize.type_before_parametrizations(module), module.__dict__)


def _restore(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    submodules = dict(state["_modules"])
    lists = submodules.pop("parametrizations")
    module.__setstate__({**state, "_modules": submodules})
    for name, stored in lists.items():
        module.register_parameter(name, stored.original)
        for parametrization in stored:
            # `unsafe` keeps torch from computing the weight, which in training is a step of the power iteration.
            parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    return _make_picklable(module)
