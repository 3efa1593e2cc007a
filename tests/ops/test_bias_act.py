from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from fastgan.ops import bias_act

module = importlib.import_module("fastgan.ops.bias_act")  # the package's attribute of that name is the function
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "silu")
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def composed(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Through the autograd Functions, with the kernels' functions in plain PyTorch."""
    settings = module._Settings(module.COMPOSED, ACTS.index(act), 0.2, 1.3)
    return module._BiasAct.apply(x, bias, settings)[0]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", ["torch", "composed"])
@pytest.mark.parametrize("biased", [True, False])
def test_derivatives(act: str, form: str, biased: bool) -> None:
    inputs = [random(2, 3, 2, 2).requires_grad_(), *[random(3, seed=1).requires_grad_()] * biased]

    def f(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return composed(x, bias, act) if form == "composed" else bias_act(x, bias, act, gain=1.3, backend="torch")

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("act", ACTS)
def test_second_derivatives_agree_and_are_none_where_they_are_zero(act: str) -> None:
    x, bias = random(2, 3, 2, 2).requires_grad_(), random(3, seed=1).requires_grad_()
    dy = random(2, 3, 2, 2, seed=2).requires_grad_()

    def second(y: Tensor) -> tuple[Tensor | None, ...]:
        dx, db = grad(y, (x, bias), dy, create_graph=True)
        return grad(dx.sin().sum() + db.cos().sum(), (dy, x, bias), allow_unused=True)

    expected = second(bias_act(x, bias, act, gain=1.3, backend="torch"))
    for e, actual in zip(expected, second(composed(x, bias, act)), strict=True):
        if e is None or actual is None:
            assert actual is None and (e is None or not e.any())
        else:
            torch.testing.assert_close(actual, e)
    if act in PIECEWISE_LINEAR:
        assert second(bias_act(x, bias, act, gain=1.3, backend="lean"))[1:] == (None, None)
