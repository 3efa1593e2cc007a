"""A penalty on a grouped convolution, and the gradient of its weight.

    pytest benchmarks/ops/bench_groups.py --benchmark-only

Groups of 16 to 1 channels, among them those of r3gan (16) and depthwise filters; contiguous and in channels_last.
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

# Batch, channels, side, groups, kernel, stride.
CASES = [
    *((16, 64, 32, 2, 3, 1), (16, 64, 32, 4, 3, 1), (16, 64, 32, 16, 3, 1), (16, 64, 32, 32, 3, 1)),
    *((16, 64, 32, 64, 3, 1), (16, 64, 32, 4, 3, 2), (16, 64, 32, 4, 1, 1), (16, 128, 16, 32, 3, 1)),
    *((16, 256, 8, 16, 3, 1), (16, 256, 8, 256, 3, 1), (4, 16, 128, 16, 3, 2)),
]


def penalty(conv: Callable[..., Tensor], case: tuple[int, ...], last: bool, dtype: torch.dtype) -> Callable[[], Any]:
    n, channels, side, groups, kernel, stride = case
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    x, w = torch.randn(n, channels, side, side), torch.randn(channels, channels // groups, kernel, kernel)
    x, w = (t.to(DEVICE, dtype, memory_format=form).requires_grad_() for t in (x, w))
    size = (side - 1) // stride + 1
    dy = torch.randn(n, channels, size, size).to(DEVICE, dtype, memory_format=form).requires_grad_()

    def run() -> list[Tensor]:
        y = conv(x, w, None, stride, kernel // 2, 1, groups)
        (g,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return [g, *torch.autograd.grad(g, w, g.detach())]

    return run


@pytest.mark.benchmark(group="a penalty on a grouped convolution")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups(benchmark: Any, case: tuple[int, ...], last: bool) -> None:
    sides = {
        "lean": penalty(ops.conv2d, case, last, torch.float32),
        "plain": penalty(F.conv2d, case, last, torch.float32),
    }
    exact = penalty(F.conv2d, case, last, torch.float64)()
    label = f"{case[:3]} {case[3]} groups, {case[4]}x{case[4]}, stride {case[5]}{', last' * last}"
    compare(benchmark, label, sides, expected=exact, baseline="plain", floor=1e-5, rounds=20)
