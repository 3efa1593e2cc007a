"""What constrains a critic besides its loss. The penalties live in `fastgan.ops`, for projects that want only those."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops import gradient_penalty, wasserstein_divergence, zero_centered_penalty
from fastgan.ops.penalty import Critic

__all__ = ["clip_weights", "gradient_penalty", "real_penalty", "wasserstein_divergence", "zero_centered_penalty"]


def real_penalty(critic: Critic, real: Tensor, fake: Tensor, *, weight: Tensor) -> Tensor:
    """R1: mean over real samples of |grad critic(x)|^2, without a factor (Mescheder et al. 2018, eq. 9).

    Times gamma / 2 it is the paper's term. Called as the other penalties are; `fake` and `weight`, the place between
    the two, do not matter to it.
    """
    return zero_centered_penalty(critic, real)


def clip_weights(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Clamp every weight `optimizer` holds to [-limit, limit] after each of its steps (Arjovsky et al. 2017, alg. 1).

    It hangs on the optimizer and not on the network because under ZeRO the optimizer owns the master copy: weights
    clamped in the network alone would be overwritten by the next step.
    """

    def clamp(optimizer: torch.optim.Optimizer, *_: object) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                torch._foreach_clamp_min_(group["params"], -limit)
                torch._foreach_clamp_max_(group["params"], limit)

    optimizer.register_step_post_hook(clamp)
