"""The transforms of `torch.func`, forward mode, autocast and inference over every op, against plain PyTorch's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernelcases import random
from torch import Tensor
from torch.autograd import forward_ad

from fastgan import ops

W = random(3, 3, 3, 3, seed=1) * 0.3
BIAS = random(3, seed=2)
ROWS = random(2, 4, seed=3)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "bias_act": lambda x: ops.bias_act(x, BIAS.to(x.dtype)),
    "bias_act silu": lambda x: ops.bias_act(x, None, "silu"),
    "pixel_norm": ops.pixel_norm,
    "bias_act_pixel_norm": lambda x: ops.bias_act_pixel_norm(x, BIAS.to(x.dtype)),
    "minibatch_stddev": lambda x: ops.minibatch_stddev(x, 2),
    "conv2d": lambda x: ops.conv2d(x, W.to(x.dtype), padding=1),
    "conv_transpose2d": lambda x: ops.conv_transpose2d(x, W.to(x.dtype), stride=2),
    "linear": lambda x: ops.linear(x, ROWS.to(x.dtype)),
    "attention": lambda x: ops.scaled_dot_product_attention(x, x.cos(), x),
    "avg_pool2d": ops.avg_pool2d,
    "avg_pool2d, overlapping": lambda x: ops.avg_pool2d(x, 3, 1, 1),
    "upsample_conv2d": lambda x: ops.upsample_conv2d(x, W.to(x.dtype)),
    "conv2d_downsample": lambda x: ops.conv2d_downsample(x, W.to(x.dtype)),
    "relu": ops.relu,
    "relu in place": lambda x: ops.relu(x * 1.5, inplace=True),
    "leaky_relu": ops.leaky_relu,
    "leaky_relu in place": lambda x: ops.leaky_relu(x * 1.5, 0.2, inplace=True),
    "relu6": ops.relu6,
    "hardtanh": ops.hardtanh,
    "hardtanh in place": lambda x: ops.hardtanh(x * 1.5, inplace=True),
    "threshold": lambda x: ops.threshold(x, 0.1, 0.5),
    "abs": ops.abs,
    "prelu": lambda x: ops.prelu(x, BIAS.to(x.dtype)),
    "pad": lambda x: ops.pad(x, (1, 1, 1, 1), "reflect"),
    "max_pool2d": lambda x: ops.max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: ops.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool2d": lambda x: ops.adaptive_max_pool2d(x, 3),
    "interpolate": lambda x: ops.interpolate(x, (3, 3), mode="area"),
    "upfirdn2d": lambda x: ops.upfirdn2d(x, [1.0, 2.0], up=2, padding=1),
    "blur": ops.blur,
}
X = random(2, 3, 4, 4)


def _forward_mode(f: Callable[[Tensor], Tensor]) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(X.clone(), X.cos()))))


def _hessian_product(f: Callable[[Tensor], Tensor]) -> Any:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone().requires_grad_(), X.cos())
        (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return tuple(forward_ad.unpack_dual(gradient))


def _inference(f: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.inference_mode():
        return f(X.clone()).clone()


def _autocast(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = X.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = f(x)
    return [y, *torch.autograd.grad(y.float().sum(), x)]


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad of grad": lambda f: torch.func.grad(
        lambda x: torch.func.grad(lambda t: f(t).square().sum())(x).square().sum()
    )(X),
    "vjp": lambda f: torch.func.vjp(lambda x: f(x).square().sum(), X)[1](torch.ones((), dtype=X.dtype))[0],
    "jvp": lambda f: torch.func.jvp(f, (X,), (X.cos(),)),
    "jacrev": lambda f: torch.func.jacrev(lambda x: f(x).sum((0, -1)))(X),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x.expand_as(X)).square().sum())(X[:1]),
    "vmap": lambda f: torch.vmap(f)(torch.stack([X, X.cos()])),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([X, X.cos()])),
    "forward mode": _forward_mode,
    "forward over reverse": _hessian_product,
    "inference_mode": _inference,
    "autocast": _autocast,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_transform(name: str, transform: str) -> None:
    found = TRANSFORMS[transform](OPS[name])
    with ops.use_backend("torch"):
        expected = TRANSFORMS[transform](OPS[name])
    tolerance = {"rtol": 0.03, "atol": 0.03} if transform == "autocast" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **tolerance)
