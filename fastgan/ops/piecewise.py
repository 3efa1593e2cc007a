"""Ops that are linear between their breaks: rectifiers, padding, pooling.

Such an op has a linear map D at every input, and its derivatives of every order are D and its adjoint: the gradient is
D^T g, that gradient's derivative in g is D, and its derivative in the input is zero. For the latter PyTorch's own ops
make a tensor of zeros and send it backward through every layer before them; these send nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.autograd import form_tag


class Rule(NamedTuple):
    """An op as functions that autograd does not see; `options` are its arguments besides the tensor.

    Attributes:
        forward: (x, options) -> the result, and the tensors that the two maps need.
        tangent: (t, options, *kept) -> D t.
        cotangent: (g, options, *kept) -> D^T g.
        in_place: as `forward`, which changes x itself and returns what to keep alone; or None.
    """

    forward: Callable[[Tensor, Any], tuple[Tensor, tuple[Tensor, ...]]]
    tangent: Callable[..., Tensor]
    cotangent: Callable[..., Tensor]
    in_place: Callable[[Tensor, Any], tuple[Tensor, ...]] | None = None


class _Apply(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, options: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        y, kept = rule.forward(x, options)
        ctx.save_for_backward(form_tag(), *kept)
        ctx.rule, ctx.options = rule, options
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return None, None, None
        _, *kept = ctx.saved_tensors
        return _map(g, ctx.rule, ctx.options, True, kept), None, None


class _ApplyInPlace(_Apply):
    """Marks its input dirty, so that aliases and the graph see what torch's own in-place op would leave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, options: Any) -> Tensor:
        assert rule.in_place is not None
        ctx.set_materialize_grads(False)
        kept = rule.in_place(x, options)
        ctx.mark_dirty(x)
        ctx.save_for_backward(form_tag(), *kept)
        ctx.rule, ctx.options = rule, options
        return x


class _Map(Function):
    """D, or its adjoint: the backward of each is the other."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, rule: Rule, options: Any, adjoint: bool, *kept: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.rest = rule, options, adjoint
        return (rule.cotangent if adjoint else rule.tangent)(t, options, *kept)

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
        rule, options, adjoint = ctx.rest
        return (rule.cotangent if adjoint else rule.tangent)(t, options, *ctx.saved_tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        kept = ctx.saved_tensors
        none = (None,) * (3 + len(kept))
        if g is None:
            return None, *none
        rule, options, adjoint = ctx.rest
        return _map(g, rule, options, not adjoint, kept), *none


def _map(t: Tensor, rule: Rule, options: Any, adjoint: bool, kept: Any) -> Tensor:
    if torch.is_grad_enabled():
        return _Map.apply(t, rule, options, adjoint, *(k.detach() for k in kept))
    return (rule.cotangent if adjoint else rule.tangent)(t, options, *kept)


def apply(x: Tensor, rule: Rule, options: Any = ()) -> Tensor:
    """The op of this rule at x."""
    return _Apply.apply(x, rule, options)


def apply_in_place(x: Tensor, rule: Rule, options: Any = ()) -> Tensor:
    """The op of this rule at x, written to x; returns x."""
    return _ApplyInPlace.apply(x, rule, options)
