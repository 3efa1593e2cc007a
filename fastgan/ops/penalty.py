"""Penalties on the gradient of a critic with respect to its input.

`critic` is any callable of x that gives one score for each sample, [N] or [N, 1]; a conditional critic is a lambda
that closes over its labels. Scores of one sample must not depend on another for the penalties to be what the papers
define (batch norm breaks that; minibatch standard deviation does too, and the progressive-growing paper accepts it).

The gradient, its norm and the penalty are float32 at least, whatever precision the critic computes in: squares of
half-precision gradients overflow and vanish, which is where NaNs in penalised mixed-precision training come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgan.ops.backend import Op

for _name in ("gradient_penalty", "wasserstein_divergence", "zero_centered_penalty"):
    Op(_name)

Critic = Callable[[Tensor], Tensor]


def _input_gradient(critic: Critic, x: Tensor) -> Tensor:
    """d(sum of scores)/dx, flattened to [N, features], float32 at least, kept in the graph."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).float().sum(), x, create_graph=True)
    gradient = gradient.flatten(1)
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient


class _Norm(Function):
    """Euclidean norm over features: [N, features] -> [N], read once. Its derivative where the norm is 0 is 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(gradient, dim=1)
        ctx.save_for_backward(gradient, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        gradient, norm = ctx.saved_tensors
        # 0 / 0 at norm 0 would be NaN in this derivative or in the next, so both branches stay finite.
        zero = norm == 0
        return gradient * torch.where(zero, 0.0, cotangent / torch.where(zero, 1.0, norm))[:, None]


def _norm(gradient: Tensor) -> Tensor:
    return _Norm.apply(gradient)


def _interpolates(real: Tensor, fake: Tensor, weight: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if real.shape != fake.shape:
        raise ValueError(f"fake: had shape {tuple(fake.shape)}; it may be {tuple(real.shape)}, as real")
    if weight is None:
        weight = torch.rand(real.shape[0], device=real.device, dtype=real.dtype, generator=generator)
    elif weight.numel() != real.shape[0]:
        raise ValueError(f"weight: had {weight.numel()} elements; it may have {real.shape[0]}, one for each sample")
    return torch.lerp(real, fake, weight.to(real.dtype).reshape(-1, *[1] * (real.ndim - 1)))


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    target: float = 1.0,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean over samples of (|grad critic(x)| - target)^2 at random interpolates x (Gulrajani et al. 2017, eq. 3).

    Args:
        critic: scores [N] or [N, 1] of x; called once.
        real, fake: [N, ...], same shape; no gradient flows into them.
        target: the norm asked for.
        generator: draws the interpolation weights, one uniform number for each sample.
        weight: [N], the interpolation weights themselves (0 is real, 1 is fake) in place of drawing them.

    Returns:
        Scalar, float32 at least, not multiplied by any coefficient. Where the gradient is exactly 0 its norm has
        derivative 0. The critic's last bias has no gradient from it: `autograd.grad` needs `allow_unused=True`.

    Raises:
        ValueError: `fake` or `weight` does not fit `real`.
    """
    return (_norm(_input_gradient(critic, _interpolates(real, fake, weight, generator))) - target).square().mean()


def wasserstein_divergence(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    k: float = 2.0,
    p: float = 6.0,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """k times the mean over samples of |grad critic(x)|^p (Wu et al. 2018, "Wasserstein divergence for GANs", eq. 6).

    x is sampled on the straight lines between paired real and fake samples, uniformly, as in the paper's experiments;
    arguments, reduction and behaviour at gradient 0 are those of `gradient_penalty`.
    """
    gradient = _input_gradient(critic, _interpolates(real, fake, weight, generator))
    if p == 2:
        return k * gradient.square().sum(dim=1).mean()
    return k * _norm(gradient).pow(p).mean()


def zero_centered_penalty(critic: Critic, x: Tensor) -> Tensor:
    """Mean over samples of |grad critic(x)|^2: R1 on real samples, R2 on fake ones (Mescheder et al. 2018, eq. 9).

    The paper multiplies by gamma / 2. Differentiable where the gradient is 0.
    """
    return _input_gradient(critic, x).square().sum(dim=1).mean()
