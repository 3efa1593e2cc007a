"""Calls that an op leaves to PyTorch: classes of tensors, dtypes and layouts unknown to its implementations.

An op with the name and signature of a torch function runs that function, an op of this package its reference. Nothing
that torch accepts is refused; `FELL_THROUGH` counts what fell through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function

from fastgan.ops.dispatch.backend import Op, in_transform

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

# (op, reason) -> calls since the process started.
FELL_THROUGH: Counter[tuple[str, str]] = Counter()


def foreign(*tensors: Any) -> bool:
    """Whether one of the tensors is not a plain, dense tensor of a floating-point dtype; None is passed over.

    Plain means `torch.Tensor` or `Parameter` itself: a subclass may compute what it likes (DTensor, a mask of
    `torch.nn.attention.bias`, FakeTensor), and its memory may hold nothing (a proxy of torch.fx is no tensor at all).
    """
    for x in tensors:
        if x is None:
            continue
        kind = type(x)
        if kind is not Tensor and kind is not Parameter:
            return True
        if x.dtype not in FLOATING or x.layout is not torch.strided or x.is_nested:
            return True
    return False


def _reason(tensors: tuple[Any, ...]) -> str:
    for x in tensors:
        if x is None or not foreign(x):
            continue
        if type(x) is not Tensor and type(x) is not Parameter:
            return type(x).__name__
        return str(x.dtype) if x.dtype not in FLOATING else "nested" if x.is_nested else str(x.layout)
    return "arguments"


def traced(function: Callable[..., Any], x: Any, /, *arguments: Any, **keywords: Any) -> Any:
    """A call of `function` as one node of a symbolic trace (torch.fx): an argument is a proxy, not a tensor.

    Raises:
        TypeError: none is a proxy.
    """
    proxies = tuple(a for a in (x, *arguments) if hasattr(a, "__torch_function__") and not isinstance(a, Tensor))
    if not proxies:
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    return handle_torch_function(function, proxies, x, *arguments, **keywords)


def fall_through(
    op: Op | str,
    function: Callable[..., Any],
    torch_function: Callable[..., Any],
    tensors: tuple[Any, ...],
    *options: Any,
    backend: str | None = None,
    **keywords: Any,
) -> Any:
    """Run `torch_function(*tensors, *options, **keywords)`.

    A symbolic trace (torch.fx) gets a call of `function` as one node instead.

    Raises:
        ValueError: another implementation than "torch" is requested by name.
    """
    name = op if isinstance(op, str) else op.name
    requested = backend if isinstance(op, str) else op.requested(backend)
    if any(hasattr(x, "__torch_function__") and not isinstance(x, Tensor) for x in tensors):
        given = {"backend": backend} if backend is not None else {}
        return traced(function, *tensors, *options, **keywords, **given)
    reason = _reason(tensors)
    if requested not in (None, "torch") and not in_transform():
        raise ValueError(f"backend {requested!r}: it does not support {reason}; can run this call: torch")
    FELL_THROUGH[name, reason] += 1
    return torch_function(*tensors, *options, **keywords)
