"""scaled_dot_product_attention against torch's: `pytest benchmarks/ops/bench_attention.py --benchmark-only`.

Sides: the default implementation, then the others that run on this machine; torch's `math` and `flash` backends (on a
GPU `flash` is the fused kernel that torch picks); `plain`, matrix products and a softmax. The fused kernels have no
second derivative; `mixed`, on a GPU, combines their forward and backward with our second backward. Select a shape with
-k 4096x4096, a mode with -k second, a dtype with -k float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import side_by_side
from fastgan.ops import attention, scaled_dot_product_attention
from fastgan.ops.attention import OP
from fastgan.ops.dispatch.kernel_registry import kernel_functions

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Sizes of a call: q is [batch, heads, n, d], k is [batch, heads, m, d], v is [batch, heads, m, dv]."""

    name: str
    batch: int
    heads: int
    n: int
    m: int
    d: int
    dv: int


CASES = [
    Case("4096x4096", 2, 1, 4096, 4096, 32, 32),
    Case("4096x1024", 2, 1, 4096, 1024, 32, 32),
    Case("SAGAN 32 px", 2, 1, 1024, 256, 32, 128),
    Case("SAGAN 64 px", 2, 1, 4096, 1024, 16, 64),
    Case("256x256 batch 16", 16, 1, 256, 256, 32, 32),
    Case("1024x1024 8 heads", 8, 8, 1024, 1024, 64, 64),
]
if GPU:
    CASES += [
        Case("4096x4096 batch 16", 16, 1, 4096, 4096, 64, 64),
        Case("SAGAN 64 px batch 16", 16, 1, 4096, 1024, 16, 64),
    ]
DTYPES = [torch.float32, torch.bfloat16]
MODES = ("forward", "first", "second")  # forward; + backward; + backward + second backward


def math_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


class FusedFirstOrder:
    """torch's fused forward and backward with the second backward of the Triton kernels, on a GPU.

    Has the functions of an implementation in `fastgan.ops.attention`: flash for 16-bit dtypes with d = dv, else torch's
    memory-efficient kernels.
    """

    @staticmethod
    def flash(q: Tensor, v: Tensor) -> bool:
        return q.dtype != torch.float32 and q.shape[-1] == v.shape[-1]

    @staticmethod
    def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        if FusedFirstOrder.flash(q, v):
            o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        else:
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            o, lse, *_ = kernel(q, k, v, None, True, 0.0, causal, scale=scale)
        return o, lse[..., : q.shape[2]].contiguous()  # some kernels pad the rows

    @staticmethod
    def attention_backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, m = q.shape[2], k.shape[2]
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of dropout
        if FusedFirstOrder.flash(q, v):
            backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
            return backward(do, q, k, v, o, lse, None, None, n, m, 0.0, causal, unused, unused, scale=scale)
        backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        lse = F.pad(lse, (0, -n % 32), value=torch.inf)
        seed, offset = unused.long().unbind()
        needed = [True, True, True, False]
        dq, dk, dv, _ = backward(do, q, k, v, None, o, lse, seed, offset, 0.0, needed, causal, scale=scale)
        return dq, dk, dv

    @staticmethod
    def attention_second_backward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = kernel_functions("attention", "triton").attention_second_backward(*arguments)
        return gradients

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            o: Tensor = attention._Forward.apply(q, k, v, q.shape[-1] ** -0.5, False, FusedFirstOrder)
            return o
        return FusedFirstOrder.attention_forward(q, k, v, q.shape[-1] ** -0.5, False)[0]


def ours(backend: str | None) -> Attend:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, backend=backend)


def run(attend: Attend, tensors: tuple[Tensor, ...], do: Tensor, us: tuple[Tensor, ...], mode: str) -> list[Tensor]:
    """[o], [o, dq, dk, dv] or [o, dq, dk, dv, gq, gk, gv, gdo], depending on the mode."""
    if mode == "forward":
        with torch.no_grad():
            return [attend(*tensors)]
    o = attend(*tensors)
    first = torch.autograd.grad(o, tensors, do, create_graph=mode == "second")
    results = [o.detach(), *(x.detach() for x in first)]
    return results if mode == "first" else [*results, *torch.autograd.grad(first, (*tensors, do), us)]


def exact(tensors: tuple[Tensor, ...], do: Tensor, us: tuple[Tensor, ...], mode: str) -> list[Tensor]:
    """The results of plain matrix products in float64, one sample at a time."""
    results = []
    for i in range(do.shape[0]):
        qkv = tuple(x[i : i + 1].detach().double().requires_grad_() for x in tensors)
        seed = do[i : i + 1].detach().double().requires_grad_()
        results.append(run(plain, qkv, seed, tuple(u[i : i + 1].double() for u in us), mode))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.benchmark(group="attention")
def test_attention(benchmark: Any, mode: str, dtype: torch.dtype, case: Case) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(length: int, features: int) -> Tensor:
        shape = (case.batch, case.heads, length, features)
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    tensors = tuple(random(*s).requires_grad_() for s in ((case.n, case.d), (case.m, case.d), (case.m, case.dv)))
    do = random(case.n, case.dv).requires_grad_()
    us = tuple(torch.randn(x.shape, generator=generator).to(DEVICE, dtype) for x in tensors)
    available = [
        name for name, it in OP.implementations.items() if name != "torch" and it.unsupported_reason(*tensors) is None
    ]
    chosen = OP.choose(None, *tensors)
    sides = {name: ours(name) for name in (chosen, *available)}
    if "triton" in available:
        try:
            run(FusedFirstOrder.attend, tensors, do, us, mode)
            sides["mixed"] = FusedFirstOrder.attend
        except (RuntimeError, TypeError) as error:  # private functions of torch, which may change
            benchmark.extra_info["mixed"] = str(error)
    large = case.batch * case.heads * case.n * case.m > 2**24 and not GPU
    sides["math"] = math_form
    if not large:
        sides["plain"] = plain
    if mode != "second" and (GPU or case.d == case.dv):
        sides["flash"] = fused
    expected = exact(tensors, do, us, mode)
    floor = [1e-6] * len(expected)
    if dtype == torch.bfloat16:
        # torch's math form computes in float32. Errors may be twice those of plain products in bfloat16.
        simple = run(plain, tensors, do, us, mode)
        floor = [2 * side_by_side.relative_error(x, e) for x, e in zip(simple, expected, strict=True)]
        del simple
    side_by_side.compare(
        benchmark,
        f"{case.name} d={case.d} dv={case.dv} {str(dtype).removeprefix('torch.')} {mode}",
        {name: partial(run, attend, tensors, do, us, mode) for name, attend in sides.items()},
        expected=expected,
        baseline="flash" if "flash" in sides else "math",
        floor=floor,
        rounds=5 if large else 30,
    )
