"""The transforms of `torch.func`, forward mode, autocast and inference over every op, against plain PyTorch's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernelcases import random
from op_calls import CALLS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fastgan import ops
from fastgan.ops.dispatch.backend import OPS

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


def _checkpointed(f: Callable[[Tensor], Tensor], reentrant: bool) -> Tensor:
    x = X.clone().requires_grad_()
    checkpoint(f, x, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None
    return x.grad


def _checkpointed_penalty(f: Callable[[Tensor], Tensor]) -> Tensor:
    def penalty(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return g.square().sum()

    x = X.clone().requires_grad_()
    return torch.autograd.grad(checkpoint(penalty, x * 1.0, use_reentrant=False), x)[0]


class _Scaled(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.scale = f, nn.Parameter(torch.ones((), dtype=X.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x * self.scale)


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
    "checkpoint": lambda f: _checkpointed(f, False),
    "reentrant checkpoint": lambda f: _checkpointed(f, True),
    "checkpoint of a penalty": _checkpointed_penalty,
    "make_fx": lambda f: make_fx(f)(X)(X.cos()),
    "functional_call": lambda f: torch.func.functional_call(_Scaled(f), {"scale": X[0, 0, 0, 0]}, (X,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_transform(name: str, transform: str) -> None:
    found = TRANSFORMS[transform](CALLS[name])
    with ops.use_backend("torch"):
        expected = TRANSFORMS[transform](CALLS[name])
    tolerance = {"rtol": 0.03, "atol": 0.03} if transform == "autocast" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **tolerance)


def test_every_op_has_a_line_in_the_table_of_calls() -> None:
    named = {name.split()[0] for name in CALLS}
    on_critics = {"gradient_penalty", "zero_centered_penalty", "wasserstein_divergence"}
    assert set(OPS) == named | on_critics
