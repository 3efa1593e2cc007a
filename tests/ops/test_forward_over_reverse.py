"""Tangents of gradients, products of a Hessian and a vector: `torch.autograd.grad` inside `forward_ad.dual_level`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgan import ops

X = (2, 4, 8, 8)
OPS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "bias_act linear": (lambda x, b, **k: ops.bias_act(x, b, "linear", gain=2.0, **k), (X, (4,))),
    "bias_act relu": (lambda x, b, **k: ops.bias_act(x, b, "relu", **k), (X, (4,))),
    "bias_act lrelu": (lambda x, b, **k: ops.bias_act(x, b, **k), (X, (4,))),
    "bias_act tanh": (lambda x, b, **k: ops.bias_act(x, b, "tanh", **k), (X, (4,))),
    "avg_pool2d": (ops.avg_pool2d, (X,)),
    "avg_pool2d 3": (lambda x, **k: ops.avg_pool2d(x, 3, **k), (X,)),
    "conv2d": (ops.conv2d, (X, (3, 4, 3, 3), (3,))),
    "conv_transpose2d": (ops.conv_transpose2d, (X, (4, 3, 3, 3))),
    "upsample_conv2d": (ops.upsample_conv2d, (X, (3, 4, 3, 3))),
    "conv2d_downsample": (ops.conv2d_downsample, (X, (3, 4, 3, 3))),
    "pixel_norm": (ops.pixel_norm, (X,)),
    "bias_act_pixel_norm": (ops.bias_act_pixel_norm, (X, (4,))),
    "minibatch_stddev": (ops.minibatch_stddev, (X,)),
    "attention": (ops.scaled_dot_product_attention, ((2, 5, 4), (2, 6, 4), (2, 6, 3))),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tangents(
    op: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], create_graph: bool, **k: str
) -> list[Tensor]:
    """Tangents of the gradients of a nonlinear function, along random directions."""
    inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    found = []
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, random(*x.shape, seed=10 + i)) for i, x in enumerate(inputs)]
        value = op(*duals, **k).square().sum() + sum((x**3).sum() for x in duals)
        for gradient in torch.autograd.grad(value, duals, create_graph=create_graph):
            tangent = forward_ad.unpack_dual(gradient).tangent
            found.append(torch.zeros_like(gradient) if tangent is None else tangent.detach())
    return found


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_tangents_of_gradients(name: str, create_graph: bool) -> None:
    op, shapes = OPS[name]
    ours, plain = (tangents(op, shapes, create_graph, **backend) for backend in ({}, {"backend": "torch"}))
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bias_act relu", "avg_pool2d 3", "conv2d"])
def test_requested_kernels_keep_tangents(name: str) -> None:
    op, shapes = OPS[name]
    inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    if "cannot run" in ops.backends(name.split()[0], *inputs)["cpp"]:
        pytest.skip("the C++ kernels cannot run here")
    for actual, expected in zip(tangents(op, shapes, False, backend="cpp"), tangents(op, shapes, False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bias_act relu", "avg_pool2d", "avg_pool2d 3", "conv2d", "conv2d_downsample"])
def test_tangent_that_starts_after_the_forward(name: str) -> None:
    op, shapes = OPS[name]
    inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]

    def tangent(**backend: str) -> list[Tensor | None]:
        y = op(*inputs, **backend)
        with forward_ad.dual_level():
            cotangent = forward_ad.make_dual(random(*y.shape, seed=20), random(*y.shape, seed=21))
            gradients = torch.autograd.grad(y, inputs, cotangent)
            return [forward_ad.unpack_dual(g).tangent for g in gradients]

    for actual, expected in zip(tangent(), tangent(backend="torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_attention_raises() -> None:
    q, k, v = (random(1, 1, 300, 8, seed=i).requires_grad_() for i in range(3))
    y = ops.scaled_dot_product_attention(q, k, v, backend="chunked")
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(NotImplementedError, match="its gradient has no forward-mode derivative"):
            torch.autograd.grad(y, q, cotangent)
