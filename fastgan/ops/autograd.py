"""What the autograd Functions of the ops share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_will_execute = getattr(torch._C, "_will_engine_execute_node", None)


def asked(ctx: Any, index: int) -> bool:
    """Whether the backward pass that is running wants the gradient of tensor input `index` of this Function.

    `ctx.needs_input_grad` tells only what could be wanted: for the inner gradient of a penalty, with respect to the
    images alone, it says yes to every weight, and a third of the penalty's work would be for nothing. The engine knows,
    except of leaves: hand inputs through `node_of` first. The tensors must come first among the Function's inputs.
    """
    if not ctx.needs_input_grad[index]:
        return False
    if _will_execute is None or torch.compiler.is_compiling():
        return True
    node = ctx.next_functions[index][0]
    try:
        return _will_execute(node)
    except RuntimeError:  # a leaf all the same, under autograd.grad
        return True


def node_of(x: Tensor) -> Tensor:
    """`x`, or a view of it where it is a leaf, so that `asked` can ask about it."""
    # A view by `...` keeps strides, where view_as makes up those of dimensions of size 1.
    return x[...] if x.requires_grad and x.is_leaf else x


def _can_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# torch.compile takes the answer: that of torch 2.10 cannot trace the question.
_can_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` is; the meta device has none."""
    if x.is_cpu:  # a third of the time of x.device.type, in every call
        return torch.is_autocast_enabled("cpu")
    device = x.device.type
    return _can_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off, where it is on: what is computed inside has its dtype already, or gets it later."""
    if torch.compiler.is_compiling() or not autocasts(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype that autocast, where it is on, has for matrix products; float64 is left as it is."""
    first = next(x for x in tensors if x is not None)
    if not autocasts(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(x: Tensor | None) -> Tensor | None:
        lower = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if x is not None and lower else x

    return tuple(map(cast, tensors))
