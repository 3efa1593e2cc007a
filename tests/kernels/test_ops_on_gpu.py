"""The ops with their Triton kernels on a GPU, through autograd: derivatives, CUDA graphs, bit-identical results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_offline import assert_accurate

from fastgan.ops import (
    bias_act,
    bias_act_pixel_norm,
    conv2d_downsample,
    minibatch_stddev,
    pixel_norm,
    scaled_dot_product_attention,
    upsample_conv2d,
)

pytestmark = pytest.mark.gpu

Op = Callable[..., Tensor]
IMAGES, BIAS = (8, 24, 17, 16), (24,)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).tril().logical_not(), -torch.inf)
    return torch.softmax(logits, -1) @ v


# The plain form of attention in fastgan.ops computes in float32, which is no fair reference for bfloat16 products.
PLAIN: dict[str, Op] = {
    "attention": lambda q, k, v, backend: plain_attention(q, k, v, False),
    "causal attention": lambda q, k, v, backend: plain_attention(q, k, v, True),
}
OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "attention": (scaled_dot_product_attention, [(2, 3, 200, 40), (2, 3, 129, 40), (2, 3, 129, 24)]),
    "causal attention": (
        lambda q, k, v, backend: scaled_dot_product_attention(q, k, v, is_causal=True, backend=backend),
        [(2, 100, 64), (2, 100, 64), (2, 100, 64)],
    ),
    "bias_act": (bias_act, [IMAGES, BIAS]),
    "bias_act silu": (lambda x, b, backend: bias_act(x, b, "silu", backend=backend), [IMAGES, BIAS]),
    "bias_act_pixel_norm": (bias_act_pixel_norm, [IMAGES, BIAS]),
    "pixel_norm": (pixel_norm, [IMAGES]),
    "minibatch_stddev": (minibatch_stddev, [IMAGES]),
    "upsample_conv2d": (upsample_conv2d, [IMAGES, (40, 24, 3, 3), (40,)]),
    "conv2d_downsample": (conv2d_downsample, [(8, 24, 18, 16), (40, 24, 3, 3), (40,)]),
}


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in OPS[name][1]]
    return [x.to("cuda", dtype).requires_grad_() for x in arrays]


def derivatives(name: str, arguments: list[Tensor], backend: str) -> list[Tensor]:
    """Output, first derivatives, and the derivatives of the sum of their squares."""
    op = PLAIN.get(name, OPS[name][0]) if backend == "torch" else OPS[name][0]
    y = op(*arguments, backend=backend)
    seed = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y).to(y.dtype)
    seed.requires_grad_()
    first = torch.autograd.grad(y, arguments, seed, create_graph=True)
    penalty = sum((g.to(torch.float64).square().mean() for g in first), torch.zeros((), device=y.device))
    second = torch.autograd.grad(penalty, [seed, *arguments], allow_unused=True)
    return [y, *first, *(g for g in second if g is not None and g.any())]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_derivatives_are_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    arguments = inputs(name, dtype)
    exact = derivatives(name, [x.detach().double().requires_grad_() for x in arguments], "torch")
    plain = derivatives(name, arguments, "torch")
    ours = derivatives(name, arguments, "triton")
    for i, (a, e, p) in enumerate(zip(ours, exact, plain, strict=True)):
        # The floor is a few roundings: second derivatives here use the rounded output, plain PyTorch's do not.
        floor = 2e-6 if dtype == torch.float32 else 0.0
        assert_accurate(a.detach(), e.detach(), p.detach(), f"{name} {i}", arguments, floor)


@pytest.mark.parametrize("name", OPS)
def test_results_are_bit_identical_between_runs(name: str) -> None:
    arguments = inputs(name, torch.bfloat16)
    for a, b in zip(*(derivatives(name, arguments, "triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_cuda_graph_replays_with_new_values(name: str) -> None:
    arguments = inputs(name, torch.float32)
    op = OPS[name][0]

    def step() -> list[Tensor]:
        y = op(*arguments, backend="triton")
        first = torch.autograd.grad(y.sum(), arguments, create_graph=True)
        penalty = sum((g.square().mean() for g in first), torch.zeros((), device="cuda"))
        second = torch.autograd.grad(penalty, arguments, allow_unused=True) if penalty.requires_grad else ()
        return [y, *first, *(g for g in second if g is not None)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in arguments:
            x.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
