"""minibatch_stddev against plain PyTorch: `pytest benchmarks/ops/bench_minibatch_stddev.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ops.feature_maps import measure, parametrize
from fastgan import ops


def plain(x: Tensor, eps: float = 1e-8) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(4, n // 4, c, h, w)
    y = torch.sqrt(y.var(dim=0, unbiased=False) + eps).mean(dim=(1, 2, 3))
    return torch.cat([x, y.repeat(4)[:, None, None, None].expand(n, 1, h, w)], dim=1)


@pytest.mark.benchmark(group="minibatch_stddev (16, 256, 64, 64)")
@parametrize
def test_minibatch_stddev(benchmark: Any, mode: str, dtype: torch.dtype, channels_last: bool) -> None:
    measure(benchmark, ops.minibatch_stddev, plain, mode=mode, dtype=dtype, channels_last=channels_last)
