"""bias_act_pixel_norm against plain PyTorch: `pytest benchmarks/ops/bench_bias_act_pixel_norm.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.feature_maps import measure, parametrize
from fastgan import ops


def plain(x: Tensor, bias: Tensor, eps: float = 1e-8) -> Tensor:
    x = F.leaky_relu(x + bias[:, None, None], 0.2)
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)


@pytest.mark.benchmark(group="bias_act_pixel_norm (16, 256, 64, 64)")
@parametrize
def test_bias_act_pixel_norm(benchmark: Any, mode: str, dtype: torch.dtype, channels_last: bool) -> None:
    measure(benchmark, ops.bias_act_pixel_norm, plain, mode=mode, dtype=dtype, channels_last=channels_last, bias=True)
