"""Instance, group and layer norm against torch's own: `pytest benchmarks/ops/bench_norms.py --benchmark-only`.

The second backward is what is ours; forward and first backward are torch's functions on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.feature_maps import DTYPES, measure
from fastgan import ops

SHAPE = (16, 128, 64, 64)


def _named(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    function.__name__ = name  # of the op whose implementations are compared
    return function


def _affine(x: Tensor) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    weight = torch.linspace(0.5, 1.5, channels, device=x.device, dtype=x.dtype)
    return weight, weight - 1


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "instance_norm": (ops.instance_norm, F.instance_norm),
    "group_norm": (
        lambda x, **options: ops.group_norm(x, 8, *_affine(x), **options),
        lambda x: F.group_norm(x, 8, *_affine(x)),
    ),
    "layer_norm": (
        lambda x, **options: ops.layer_norm(x, x.shape[1:], **options),
        lambda x: F.layer_norm(x, x.shape[1:]),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("mode", ["backward", "second"])
@pytest.mark.parametrize("name", CASES)
def test_norm(benchmark: Any, name: str, mode: str, dtype: torch.dtype) -> None:
    op, plain = CASES[name]
    benchmark.group = f"{name} {SHAPE}"
    measure(benchmark, _named(op, name), plain, mode=mode, dtype=dtype, channels_last=False, shape=SHAPE)
