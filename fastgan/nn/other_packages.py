"""Classes of other packages, with `fastgan.functional` in place of `torch.nn.functional` in attention and norms.

timm's modules are long, many and change with its versions: a copy of their code would be a copy to maintain.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from fastgan import functional as F

ORIGINAL = "_fastgan_original"
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward")
_NORMS = ("layer_norm", "group_norm")


class _Instead:
    """An object with some attributes replaced; for `torch.nn.functional.f(...)` in a function that imports torch."""

    def __init__(self, replaced: Any, **attributes: Any) -> None:
        self._replaced = replaced
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replaced, name)


_LEAN_NN = _Instead(nn, functional=F)
_LEAN_TORCH = _Instead(torch, nn=_LEAN_NN)


def over_lean_functions(
    function: Callable[..., Any], names: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """A Python function, with `fastgan.functional` where it has `torch.nn.functional` or a name of it.

    For long functions of others, which this package would otherwise have to copy for every version of them.

    Args:
        function: a plain function of a module; names that it imports itself are not seen.
        names: global names of its module -> what they are in the copy, besides.
    """
    assert isinstance(function, FunctionType)
    instead: dict[Any, Any] = {torch.nn.functional: F}
    if "functional" in function.__code__.co_names:
        instead |= {nn: _LEAN_NN, torch: _LEAN_TORCH}
    known = dict(function.__globals__)
    for name, value in function.__globals__.items():
        if isinstance(value, ModuleType):
            known[name] = instead.get(value, value)
        elif name in F.LEAN and value is getattr(torch.nn.functional, name, None):
            known[name] = getattr(F, name)
    known.update(names or {})
    copy = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__doc__ = function.__doc__
    return copy


def has_a_name(function: FunctionType, names: Iterable[str]) -> bool:
    """Whether the code of a function has one of these names, of a global or an attribute."""
    return any(name in function.__code__.co_names for name in names)


def lean_subclass(kind: type, maker: Callable[[Any], type | None], methods: dict[str, Callable[..., Any]]) -> type:
    """A subclass with the name of `kind` and these methods, whose instances can be pickled and copied.

    `maker(kind)`, a function of a module that gives the same class at every call, makes it.
    """

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _new, (maker, kind), self.__getstate__()  # a class made at run time cannot be found by its name

    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": reduce, ORIGINAL: kind}
    metaclass: Any = type(kind)
    return metaclass(kind.__name__, (kind,), {**methods, **names})


def _new(maker: Callable[[Any], type | None], kind: type) -> Any:
    made: Any = maker(kind)
    return made.__new__(made)


def original_class(kind: type) -> type | None:
    """What `lean_subclass` made a class from; None for other classes."""
    return vars(kind).get(ORIGINAL)


@functools.cache
def lean_class_of_timm(kind: Any) -> Any:
    """The lean class of a module of timm that calls torch's attention or a norm; None for every other class."""
    if not kind.__module__.startswith("timm.") or original_class(kind) is not None:
        return None
    methods = {
        name: over_lean_functions(method)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if has_a_name(method, (*ATTENTION, *_NORMS))
    }
    return lean_subclass(kind, lean_class_of_timm, methods) if methods else None
