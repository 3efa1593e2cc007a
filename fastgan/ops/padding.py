"""`torch.nn.functional.pad`, whose reflection and replication send no zeros backward in second order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.ops import piecewise
from fastgan.ops.autograd import tracked
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import LEAN, Op
from fastgan.ops.fallthrough import fall_through, foreign
from fastgan.ops.piecewise import Rule

PAD = Op("pad", {"lean": LEAN})
_ATEN = {"reflect": "reflection", "replicate": "replication"}


def _forward(x: Tensor, options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    mode, padding, _ = options
    return F.pad(x, padding, mode), ()


def _tangent(t: Tensor, options: Any) -> Tensor:
    mode, padding, _ = options
    return F.pad(t, padding, mode)


def _cotangent(g: Tensor, options: Any) -> Tensor:
    mode, padding, shape = options
    backward = getattr(torch.ops.aten, f"{_ATEN[mode]}_pad{len(padding) // 2}d_backward").default
    return backward(g, g.new_empty(shape), padding)  # of the second it reads the shape


_RULE = Rule(_forward, _tangent, _cotangent)


def pad(
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.pad`, whose second derivative, which is zero, sends nothing backward in any mode.

    Args:
        input: any shape that torch pads in this mode; what is not a plain tensor runs in torch's own function.
        pad: as in torch, beginning with the last dimension.
        mode: "constant" or "circular", which are torch's own; "reflect" or "replicate".
        value: of "constant".
        backend: "lean" or "torch".
    """
    if foreign(input):
        return fall_through(PAD, _pad, F.pad, (input,), pad, mode, value, backend=backend)
    lean = mode in _ATEN and value in (None, 0) and len(pad) in (2, 4, 6) and PAD.choose(backend, input) == "lean"
    # Of unbatched and batched input alike; what does not fit is torch's to refuse.
    if not lean or not tracked(input) or input.ndim - len(pad) // 2 not in (1, 2):
        return F.pad(input, pad, mode, value)
    return piecewise.apply(input, _RULE, (mode, tuple(pad), input.shape))


_pad = pad  # its argument has its name
