"""Losses and regularizers: pure functions, orthogonal to the networks."""

from fastgan.objectives.losses import (
    LOSSES,
    Loss,
    hinge,
    least_squares,
    minimax,
    register,
    relativistic,
    wasserstein,
)
from fastgan.objectives.regularizers import (
    both_penalty,
    clip_weights,
    gradient_penalty,
    real_penalty,
    wasserstein_divergence,
    zero_centered_penalty,
)

__all__ = [
    "LOSSES",
    "Loss",
    "both_penalty",
    "clip_weights",
    "gradient_penalty",
    "hinge",
    "least_squares",
    "minimax",
    "real_penalty",
    "register",
    "relativistic",
    "wasserstein",
    "wasserstein_divergence",
    "zero_centered_penalty",
]
