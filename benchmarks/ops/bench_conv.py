"""3x3 convolutions, alone and fused with up- or downsampling, against the steps in plain PyTorch.

    pytest benchmarks/ops/bench_conv.py --benchmark-only -k "upsample_conv2d and channels_last and f32"

Modes: forward; with the first backward; with a second backward through the gradients of x and w. Contiguous and
channels_last, f32 and bf16. The summary of each group has the geometric mean of the speed-ups over the shapes, and the
smallest. The first side is the default. `winograd` and, with a change of scale, `fused` are compared as well, and on a
GPU the Triton kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import compare
from fastgan import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# batch, channels in and out, size of the larger image
SHAPES = [
    (16, 512, 8),
    (8, 512, 16),
    (16, 256, 16),
    (8, 256, 32),
    (8, 128, 32),
    (4, 128, 64),
    (16, 64, 32),
    (4, 64, 128),
    (16, 32, 16),
    (8, 32, 64),
    (2, 32, 256),
    (16, 16, 8),
    (8, 16, 64),
    (2, 16, 256),
]


def plain_up(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w, bias, padding=1)


def plain_down(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.avg_pool2d(F.conv2d(x, w, bias, padding=1), 2)


def plain_same(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, w, bias, padding=1)


def ours_same(x: Tensor, w: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    return ops.conv2d(x, w, bias, padding=1, backend=backend)


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "conv2d": (ours_same, plain_same),
    "upsample_conv2d": (ops.upsample_conv2d, plain_up),
    "conv2d_downsample": (ops.conv2d_downsample, plain_down),
}


def run(op: Callable[..., Tensor], inputs: list[Tensor], seeds: list[Tensor], mode: str) -> list[Tensor]:
    if mode == "forward":
        with torch.no_grad():
            return [op(*inputs)]
    y = op(*inputs)
    if mode == "backward":
        return [y, *torch.autograd.grad(y, inputs, seeds[0])]
    first = torch.autograd.grad(y, inputs[:2], seeds[0], create_graph=True)
    return [y, *first, *torch.autograd.grad(first, inputs[:2], seeds[1:])]


@pytest.mark.parametrize("mode", ["forward", "backward", "second"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_scaled_convolution(
    benchmark: Any, name: str, dtype: str, shape: tuple[int, int, int], layout: str, mode: str
) -> None:
    n, c, size = shape
    ours, plain = PAIRS[name]
    before = size // 2 if ours is ops.upsample_conv2d else size
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.manual_seed(0)
    inputs = [torch.randn(n, c, before, before), torch.randn(c, c, 3, 3) / (3 * c**0.5), torch.randn(c)]
    inputs = [t.to(DEVICE, DTYPES[dtype]) for t in inputs]
    inputs = [t.to(memory_format=form) if t.ndim == 4 else t for t in inputs]
    with torch.no_grad():
        seeds = [torch.randn_like(t) for t in (plain(*inputs), *inputs[:2])]
    double = [t.double().requires_grad_() for t in inputs]
    expected = run(plain, double, [t.double() for t in seeds], mode)
    inputs = [t.requires_grad_() for t in inputs]
    sides = {"lean": lambda: run(ours, inputs, seeds, mode), "plain": lambda: run(plain, inputs, seeds, mode)}
    known = ops.backends(name, *inputs[:2])
    for one in ("winograd", "fused", "triton"):
        if "cannot run" not in known.get(one, "cannot run"):
            sides[one] = functools.partial(run, functools.partial(ours, backend=one), inputs, seeds, mode)
    benchmark.group = f"{name} {layout} {dtype} {mode}"
    compare(
        benchmark,
        str(shape),
        sides,
        expected=expected,
        baseline="plain",
        # The gradient of the bias is a sum of thousands of terms that cancel; PyTorch's own error is about 1e-6.
        floor=1e-5,
    )
