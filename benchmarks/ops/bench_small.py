"""bias_act on small layers beside PyTorch's own: `pytest benchmarks/ops/bench_small.py --benchmark-only`.

A side is 200 calls, of which Python takes most of the time: divide the milliseconds by 0.2 for microseconds a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import compare
from fastgan import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = 200


@pytest.mark.benchmark(group="200 calls of bias_act, forward and backward")
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(16, 64), (4, 16, 4, 4), (4, 64, 4, 4)], ids=str)
def test_small(benchmark: Any, shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=DEVICE), torch.randn(shape[1], device=DEVICE)][: 1 + biased]
    dy = torch.randn(shape, device=DEVICE)
    view = (-1, *[1] * (len(shape) - 2))

    def plain(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.leaky_relu(x if bias is None else x + bias.view(view), 0.2)

    def side(op: Callable[..., Tensor], dtype: torch.dtype, calls: int) -> Callable[[], list[Tensor]]:
        leaves, cotangent = [t.to(dtype).requires_grad_() for t in tensors], dy.to(dtype)

        def run() -> list[Tensor]:
            for _ in range(calls):
                y = op(*leaves)
                gradients = torch.autograd.grad(y, leaves, cotangent)
            return [y, *gradients]

        return run

    sides = {"native": side(ops.bias_act, torch.float32, CALLS), "plain": side(plain, torch.float32, CALLS)}
    label = f"{shape}{', bias' * biased}"
    compare(benchmark, label, sides, expected=side(plain, torch.float64, 1)(), baseline="plain", memory=False)
