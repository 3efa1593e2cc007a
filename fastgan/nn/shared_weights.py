"""Weights that a layer computes from its parameters, computed once for all passes of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

# By parameter, scale, and whether gradients are recorded. The parameter is kept, so that its id stays its own.
_Shared = dict[tuple[int, float, bool], tuple[Tensor, Tensor]]
_SHARED: ContextVar[_Shared | None] = ContextVar("shared weights", default=None)


@contextlib.contextmanager
def shared_weights() -> Iterator[None]:
    """Within it, layers with equalized learning rate scale their weights once, and under autocast cast them once.

    For several passes of a network in one step: a discriminator scores real and fake images and, in a penalty,
    interpolates. torch's autocast caches casts of parameters alone, and a scaled weight is none. All passes must be
    part of one backward, and no weight may change between them.
    """
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def scaled(weight: Tensor, scale: float, cast: bool = True) -> Tensor:
    """`weight` times `scale`; within `shared_weights` the same tensor at every call.

    `cast`: there in the precision of autocast; False where more is computed from it in float32.
    """
    shared = _SHARED.get()
    if shared is None:
        return weight * scale
    key = (id(weight), scale, torch.is_grad_enabled())
    if key not in shared:
        kind, result = weight.device.type, weight * scale
        if cast and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            result = result.to(torch.get_autocast_dtype(kind))
        shared[key] = (weight, result)
    return shared[key][1]
