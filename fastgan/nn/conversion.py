"""Switch the layers of an existing model over to lean ones, and back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastgan import functional as lean_functional
from fastgan.nn import power_iteration
from fastgan.nn.lean import LEAN
from fastgan.nn.other_packages import ORIGINAL, lean_class_of_timm, original_class
from fastgan.ops.autograd import with_zeros
from fastgan.ops.dispatch.backend import in_transform

Model = TypeVar("Model", bound=nn.Module)
_LEAN: dict[Any, Any] = LEAN | power_iteration.LEAN
_PLAIN = {lean: plain for plain, lean in _LEAN.items()}


@dataclass
class Conversion:
    """What `convert` or `revert` did.

    Attributes:
        replaced: class -> modules that got another class.
        left: class -> modules without children that kept theirs.
    """

    replaced: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"replaced {listed(self.replaced)}; left as they are: {listed(self.left)}; "
            "calls of torch's functions inside a forward are not converted: fastgan.nn.report(critic, x) lists them"
        )


def listed(counts: Counter[str]) -> str:
    """As in `Conv2d 3, ReLU 2`."""
    return ", ".join(f"{name} {n}" for name, n in counts.most_common()) or "nothing"


def convert(model: nn.Module, *, zeros: bool = False) -> Conversion:
    """Give the layers of a model the classes of `fastgan.nn.lean`, in place: the same results, a faster penalty.

    Parameters, buffers, hooks, parametrizations, `state_dict` and weight sharing stay; only classes change. A model
    with several spectral norms gets two hooks, which compute their power iterations in one call. It may be done before
    or after the model is wrapped (DistributedDataParallel, fully_shard) or compiled for the first time. A subclass of a
    layer is left as it is, as its forward may do anything, and so are functional calls in a forward: write
    `import fastgan.functional as F` there.

    Args:
        model: any module; its submodules are visited, and itself.
        zeros: every parameter of the model that requires a gradient gets zeros, and not None, from a derivative of the
            model's gradient that does not depend on it: DistributedDataParallel waits for every parameter, and
            optimizers skip those whose gradient is None. Plain PyTorch sends such zeros to all biases but those behind
            which nothing but linear layers follows. Not together with fully_shard.

    Returns:
        What was replaced; print it.

    Example:
        >>> report = fastgan.nn.convert(critic)
        >>> print(report)
    """
    done = _change(model, _lean_class, _lean_activation, power_iteration.LEAN)
    power_iteration.compute_ahead(model)
    _remove_zeros(model)
    if zeros:
        model.register_forward_pre_hook(_send_zeros, with_kwargs=True)
    return done


def revert(model: nn.Module) -> Conversion:
    """Give the layers of a model their original classes back; the inverse of `convert`."""
    done = _change(model, _plain_class, _plain_activation, _PLAIN)
    power_iteration.leave(model)
    _remove_zeros(model)
    return done


def replaceable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """What `convert` would replace, and changes nothing: modules, each with the class that is counted for it."""
    planned = _planned(model, _lean_class, _lean_activation, power_iteration.LEAN)
    return [(module, name) for module, name, change in planned if change is not None]


def _change(
    model: nn.Module,
    class_of: Callable[[type[nn.Module]], type[nn.Module] | None],
    activation_of: Callable[[Any], Any],
    hooks: dict[Any, Any],
) -> Conversion:
    done = Conversion()
    for _, name, change in _planned(model, class_of, activation_of, hooks):
        if change is None:
            done.left[name] += 1
        else:
            change()
            done.replaced[name] += 1
    return done


def _planned(
    model: nn.Module,
    class_of: Callable[[type[nn.Module]], type[nn.Module] | None],
    activation_of: Callable[[Any], Any],
    hooks: dict[Any, Any],
) -> Iterator[tuple[nn.Module, str, Callable[[], None] | None]]:
    """Each module that is counted, the class for which it counts, and what changes it; None: it stays as it is."""
    for name, module in model.named_modules():
        for hook in power_iteration.hooks_of(module, hooks):
            yield module, "SpectralNorm", partial(setattr, hook, "__class__", hooks[type(hook)])
        kind = class_of(type(module))
        if kind is not None:
            yield module, _name(module, kind), partial(setattr, module, "__class__", kind)
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            activation = activation_of(module.activation)
            if activation is not module.activation:
                yield module, type(module).__name__, partial(setattr, module, "activation", activation)
        elif "parametrizations" not in name.split(".") and not any(True for _ in module.children()):
            yield module, _name(module, type(module)), None


def _name(module: nn.Module, kind: type[nn.Module]) -> str:
    name = kind.__name__.lstrip("_")
    return f"{name}(inplace)" if getattr(module, "inplace", False) is True else name


def _is_made_at_run_time(kind: type) -> bool:
    """Whether a class was made for one module, as torch does to parametrize it or to shard its parameters."""
    return getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind


def _known_lean_class(kind: Any) -> type[nn.Module] | None:
    return _LEAN.get(kind) or lean_class_of_timm(kind)


def _lean_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The lean class for modules of this class; None where there is none, or where it is lean already."""
    known = _known_lean_class(kind)
    if known is not None or original_class(kind) is not None:
        return known
    bases = tuple(_known_lean_class(base) or base for base in kind.__bases__)
    if bases == kind.__bases__ or not _is_made_at_run_time(kind) or "forward" in vars(kind):
        return None
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(kind)
    return metaclass(kind.__name__, bases, {**names, ORIGINAL: kind})


def _plain_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    if kind in _PLAIN:
        return _PLAIN[kind]
    original = original_class(kind)
    if original is not None:
        return original
    bases = tuple(_PLAIN.get(base) or original_class(base) or base for base in kind.__bases__)
    if bases == kind.__bases__ or not _is_made_at_run_time(kind):
        return None
    # Parametrized or sharded after it was converted.
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(kind)
    return metaclass(kind.__name__, bases, names)


def _lean_activation(activation: Any) -> Any:
    return lean_functional.relu if activation is torch.nn.functional.relu else activation


def _plain_activation(activation: Any) -> Any:
    return torch.nn.functional.relu if activation is lean_functional.relu else activation


class _ZerosFromGradient(Function):
    """x, whose gradient depends on the parameters: its derivative gives them zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * len(ctx.parameters)
        return (None if gradient is None else with_zeros(gradient, ctx.parameters)), *none


def _send_zeros(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward hook of `convert(zeros=True)`."""
    if not torch.is_grad_enabled() or in_transform():
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]

    def send(value: Any) -> Any:
        differentiated = isinstance(value, Tensor) and value.requires_grad and parameters
        return _ZerosFromGradient.apply(value, *parameters) if differentiated else value

    return tuple(map(send, args)), {name: send(value) for name, value in kwargs.items()}


def _remove_zeros(model: nn.Module) -> None:
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _send_zeros]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
