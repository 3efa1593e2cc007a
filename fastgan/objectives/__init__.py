"""Losses and regularizers: pure functions, orthogonal to the networks."""

from fastgan.objectives.losses import Loss, hinge, least_squares, minimax, wasserstein
from fastgan.objectives.regularizers import (
    clip_weights,
    gradient_penalty,
    real_penalty,
    wasserstein_divergence,
    zero_centered_penalty,
)

__all__ = [
    "Loss",
    "clip_weights",
    "gradient_penalty",
    "hinge",
    "least_squares",
    "minimax",
    "real_penalty",
    "wasserstein",
    "wasserstein_divergence",
    "zero_centered_penalty",
]
