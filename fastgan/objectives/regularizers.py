"""Regularizers of a critic. The penalties are in `fastgan.ops`, for projects that use nothing else of fastgan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastgan.ops import gradient_penalty, wasserstein_divergence, zero_centered_penalty
from fastgan.ops.dispatch.torch_private import clamp_all_
from fastgan.ops.penalty import Critic

__all__ = [
    "both_penalty",
    "clip_weights",
    "gradient_penalty",
    "real_penalty",
    "wasserstein_divergence",
    "zero_centered_penalty",
]


def real_penalty(
    critic: Critic, real: Tensor, fake: Tensor, *, weight: Tensor, scale: Tensor | None = None, **of_real: Any
) -> Tensor:
    """R1: mean over real samples of |grad critic(x)|^2, without a factor (Mescheder et al. 2018, eq. 9).

    The paper multiplies it by gamma / 2. It has the signature of the other penalties and ignores `fake` and `weight`.
    `of_real`: other arguments of `zero_centered_penalty`.
    """
    return zero_centered_penalty(critic, real, scale=scale, **of_real)


def both_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    weight: Tensor,
    scale: Tensor | None = None,
    of_fake: Mapping[str, Any] = MappingProxyType({}),
    **of_real: Any,
) -> Tensor:
    """R1 + R2: the means of |grad critic(x)|^2 over real and over generated samples (Mescheder et al. 2018, eq. 9).

    Huang et al. 2024 multiply it by gamma / 2. It ignores `weight`. `of_real`, `of_fake`: other arguments of
    `zero_centered_penalty`.
    """
    of_both = zero_centered_penalty(critic, real, scale=scale, **of_real)
    return of_both + zero_centered_penalty(critic, fake, scale=scale, **of_fake)


def clip_weights(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Clamp every weight of `optimizer` to [-limit, limit] after each of its steps (Arjovsky et al. 2017, alg. 1).

    Under ZeRO the optimizer has the master copy of the weights: clamping those of the network would have no effect.
    """

    def clamp(optimizer: torch.optim.Optimizer, *_: object) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                clamp_all_(group["params"], -limit, limit)

    optimizer.register_step_post_hook(clamp)
