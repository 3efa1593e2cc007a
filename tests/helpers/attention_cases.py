"""Inputs and reference results of attention for the tests in tests/ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernelcases import error, random, rms
from torch import Tensor

from fastgan.ops import scaled_dot_product_attention
from fastgan.ops.attention import OP

NO_CPP = OP.implementations["cpp"].unsupported_reason()
CPP = pytest.param("cpp", marks=pytest.mark.skipif(NO_CPP is not None, reason=f"no C++ kernels: {NO_CPP}"))
KERNELS = ["chunked", CPP]
FORMS = ["torch", *KERNELS]


def inputs(
    *leading: int, n: int = 5, m: int = 3, d: int = 4, dv: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    shapes = (n, d), (m, d), (m, dv)
    return tuple(random(*leading, *shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes))


def plain(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """Matrix products and softmax in the dtype of the inputs: the oracle in float64."""
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return torch.softmax(logits, -1) @ value


def derivatives(
    attend: Callable[..., Tensor], tensors: tuple[Tensor, ...], drawn: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output, first and second derivatives for cotangents drawn from fixed seeds, rounded to the dtype `drawn`."""
    dtype = tensors[0].dtype
    q, k, v = tensors
    o = attend(q, k, v)
    do = random(*o.shape, seed=10, dtype=drawn or dtype).to(dtype).requires_grad_()
    first = torch.autograd.grad(o, (q, k, v), do, create_graph=True)
    us = tuple(random(*x.shape, seed=20 + i, dtype=drawn or dtype).to(dtype) for i, x in enumerate(first))
    second = torch.autograd.grad(first, (q, k, v, do), us)
    names = ("o", "dq", "dk", "dv", "gq", "gk", "gv", "gdo")
    return dict(zip(names, (o, *first, *second), strict=True))


def widened(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() for x in tensors)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of `exact`, which is not small."""
    assert exact.square().mean() > 1e-6
    return error(x, exact) / rms(exact)


def form(backend: str | None, **rest: object) -> Callable[..., Tensor]:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, backend=backend, **rest)  # type: ignore[arg-type]
