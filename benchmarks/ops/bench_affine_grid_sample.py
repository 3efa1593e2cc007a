"""affine_grid_sample against plain PyTorch: `pytest benchmarks/ops/bench_affine_grid_sample.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.feature_maps import MODES, measure
from fastgan import ops

SHAPE = (32, 3, 64, 64)


def maps(n: int, x: Tensor) -> Tensor:
    """Rotations by up to 0.3 radians and translations by up to a tenth of the image."""
    angle = torch.linspace(-0.3, 0.3, n, device=x.device)
    row = torch.stack([angle.cos(), -angle.sin(), angle / 3.0], dim=1)
    return torch.stack([row, torch.stack([angle.sin(), angle.cos(), -angle / 3.0], dim=1)], dim=1)


def sample(x: Tensor, backend: str | None = None) -> Tensor:
    return ops.affine_grid_sample(x, maps(len(x), x), backend=backend)


def plain(x: Tensor) -> Tensor:
    theta = maps(len(x), x).to(x.dtype)
    return F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False
    )


sample.__name__ = "affine_grid_sample"


@pytest.mark.benchmark(group=f"affine_grid_sample {SHAPE}")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES[:2])  # some releases of PyTorch have no second derivative of grid_sample
def test_affine_grid_sample(benchmark: Any, mode: str, channels_last: bool) -> None:
    measure(benchmark, sample, plain, mode=mode, dtype=torch.float32, channels_last=channels_last, shape=SHAPE)
