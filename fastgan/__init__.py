"""fastgan: kernels and distributed training for generative adversarial networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fastgan.sample import TrainedGenerator

__version__ = "0.1.0"


def load(path: str | Path, device: str = "cpu") -> TrainedGenerator:
    """The generator of a run: `fastgan.load("RUN").sample(16, seed=0)`; see `fastgan.sample.load`."""
    from fastgan.sample import load

    return load(path, device)
