"""Values and second derivatives of a model, and PyTorch's math form of attention to compare them with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def penalty_gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The result of `run`, its penalty on the gradient in x, and the gradient of that for every parameter."""
    x = x.detach().requires_grad_()
    value = run(x)
    (slope,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    penalty = slope.square().sum()
    found = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return [value.detach(), penalty.detach(), *(torch.zeros_like(p) if g is None else g for g, p in pairs)]


def by_math(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The same, with torch's attention in its only form that has a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return penalty_gradients(model, run, x)
