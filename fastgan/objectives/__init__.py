"""Losses and regularizers: pure functions, orthogonal to the networks."""

from fastgan.objectives.losses import Loss, hinge, least_squares, minimax, relativistic, wasserstein
from fastgan.objectives.regularizers import (
    both_penalty,
    clip_weights,
    gradient_penalty,
    real_penalty,
    wasserstein_divergence,
    zero_centered_penalty,
)

__all__ = [
    "Loss",
    "both_penalty",
    "clip_weights",
    "gradient_penalty",
    "hinge",
    "least_squares",
    "minimax",
    "real_penalty",
    "relativistic",
    "wasserstein",
    "wasserstein_divergence",
    "zero_centered_penalty",
]
