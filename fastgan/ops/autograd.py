"""What the autograd Functions of the ops share: which gradients are needed, placeholders, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.dispatch.torch_private import (
    constant_when_compiled,
    dispatch_modes,
    in_forward_mode,
    lazy_clone,
    saved_tensors_are_hooked,
    will_execute_node,
)


def needs_gradient(ctx: Any, index: int) -> bool:
    """Whether the running backward pass needs the gradient of tensor input `index` of this Function.

    `ctx.needs_input_grad` tells which gradients could be needed. For the inner gradient of a penalty, which is with
    respect to the images alone, it is True for every weight, and a third of the work would be wasted. The engine knows
    what is needed, except for leaves: pass inputs through `non_leaf` first. Tensors must come first among the inputs.
    """
    if not ctx.needs_input_grad[index]:
        return False
    if will_execute_node is None or torch.compiler.is_compiling():
        return True
    node = ctx.next_functions[index][0]
    try:
        return will_execute_node(node)
    except RuntimeError:  # a leaf all the same, under autograd.grad
        return True


def non_leaf(x: Tensor) -> Tensor:
    """`x`, or a view of it where it is a leaf, so that `needs_gradient` can tell."""
    # A view by `...` keeps strides, where view_as makes up those of dimensions of size 1.
    return x[...] if x.requires_grad and x.is_leaf else x


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd tracks a call with these tensors, in reverse or in forward mode."""
    if in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def placeholder(x: Tensor) -> Tensor:
    """A tensor of x's shape on one element of uninitialized memory, which nothing reads.

    A forward Function returns it as a second output and saves it in place of x. The second derivative with respect to
    x is the gradient of the placeholder, which the backward of that Function passes on to x: x's memory can be freed.
    """
    return torch.empty_strided(x.shape, [0] * x.ndim, dtype=x.dtype, device=x.device)


def add_gradients(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two gradients, where None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def kept(y: Tensor) -> Tensor:
    """What a Function saves of its result `y`, which may then be changed in place before the backward.

    On a CPU it is a copy on write: it has y's memory until y is changed. Elsewhere it is `y` itself, and autograd
    raises where y was changed: a Triton kernel that reads `y` or the copy asks for an address that it may write to,
    which would make the copy in every step.
    """
    if torch.compiler.is_compiling() or lazy_clone is None or not y.is_cpu or dispatch_modes():
        return y
    return lazy_clone(y)


class _WithZeros(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return gradient, *(z if need else None for z, need in zip(zeros, ctx.needs_input_grad[1:], strict=True))


def with_zeros(x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """x, from whose derivative each of the parameters gets zeros besides, so that none has the gradient None.

    DistributedDataParallel waits for a gradient of every parameter, and optimizers skip one whose gradient is None.
    """
    needed = [p for p in parameters if p.requires_grad]
    return _WithZeros.apply(x, *needed) if needed and x.requires_grad and torch.is_grad_enabled() else x


_TAGS: dict[str, Tensor] = {}


def form_tag(form: str = "") -> Tensor | None:
    """What a Function of ours saves first, so that nothing it saves is taken for what another form of the op saves.

    A checkpoint (`torch.utils.checkpoint`) recomputes a part in the backward pass, and hands what is saved then to
    the nodes of the forward pass, by its position alone. If the two ran in different forms of an op, that would be
    a silent wrong gradient. It compares shapes, however, and no other form saves a tensor of this one.

    Args:
        form: name of the form, where forms of one op save tensors of different meaning.

    Returns:
        An empty tensor; None where nothing watches what is saved.
    """
    if torch.compiler.is_compiling() or not saved_tensors_are_hooked():
        return None
    if form not in _TAGS:
        with torch.inference_mode(False):
            _TAGS[form] = torch.empty(0, 7, 11, 13 + len(_TAGS), dtype=torch.uint8, device="cpu")
    return _TAGS[form]


class _Tagged(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tag: Tensor) -> Tensor:
        ctx.save_for_backward(tag)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def tagged(x: Tensor, form: str) -> Tensor:
    """x, behind which a form without a Function of ours saves a `form_tag` of its own."""
    tag = form_tag(form)
    return x if tag is None else _Tagged.apply(x, tag)


class SecondBackward(Function):
    """Runs the kernel of an op's second backward, `apply(op, kernel, *arguments)`; a third derivative raises.

    Autograd would otherwise drop its terms silently. Every tensor on which the result depends must be an argument.
    """

    @staticmethod
    def forward(ctx: Any, op: str, kernel: Callable[..., Any], *arguments: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.op, ctx.inputs = op, 2 + len(arguments)
        return kernel(*arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[None, ...]:
        if any(u is not None for u in cotangents):
            raise NotImplementedError(f"third derivative of {ctx.op} is not implemented; backend='torch' has it")
        return (None,) * ctx.inputs


@constant_when_compiled  # torch.compile of torch 2.10 cannot trace this function
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; the meta device has none."""
    if x.is_cpu:  # a third of the time of x.device.type, in every call
        return torch.is_autocast_enabled("cpu")
    device = x.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def computes_in(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of `x`: autocast's, where that is on."""
    if not autocast_enabled(x) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which autocast is off for the device of `x`."""
    if torch.compiler.is_compiling() or not autocast_enabled(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype for matrix products, where autocast is on; float64 stays."""
    first = next(x for x in tensors if x is not None)
    if not autocast_enabled(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(x: Tensor | None) -> Tensor | None:
        lower = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if x is not None and lower else x

    return tuple(map(cast, tensors))
