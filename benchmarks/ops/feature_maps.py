"""Shared by the benchmarks of ops on feature maps [N, C, H, W]: forward, with backward, with second backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.side_by_side import Row, Side, compare
from fastgan import ops

SHAPE = (16, 256, 64, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("forward", "backward", "second")
DTYPES = (torch.float32, torch.bfloat16)

Op = Callable[..., Tensor]


def parametrize(function: Any) -> Any:
    """Parametrize a benchmark by `mode`, `dtype` and `channels_last`."""
    function = pytest.mark.parametrize("mode", MODES)(function)
    function = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])(function)
    return pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])(function)


def outputs(f: Op, mode: str, inputs: list[Tensor], dy: Tensor, cotangents: list[Tensor]) -> list[Tensor | None]:
    """The result of f; with its gradients, for `dy`; with their gradients in `dy` and every input, for `cotangents`."""
    if mode == "forward":
        with torch.no_grad():
            return [f(*inputs)]
    y = f(*inputs)
    first = torch.autograd.grad(y, inputs, dy, create_graph=mode == "second")
    if mode == "backward":
        return [y, *first]
    second = torch.autograd.grad(first, [dy, *inputs], cotangents, allow_unused=True)
    return [y, *first, *second]


def measure(
    benchmark: Any,
    op: Op,
    plain: Op,
    *,
    mode: str,
    dtype: torch.dtype,
    channels_last: bool,
    bias: bool = False,
    shape: tuple[int, int, int, int] = SHAPE,
    rounds: int = 10,
) -> Row:
    """Compare every implementation of `op` that runs on this machine, the default first, with `plain`."""
    generator = torch.Generator().manual_seed(0)

    def random(sizes: tuple[int, ...]) -> Tensor:
        x = torch.randn(sizes, generator=generator).to(DEVICE, dtype)
        return x.to(memory_format=torch.channels_last) if channels_last and len(sizes) == 4 else x

    inputs = [random(shape), *[random(shape[1:2])] * bias]
    cotangents = [random(tuple(x.shape)) for x in inputs]
    dy = random(tuple(op(*inputs).shape))

    def side(f: Op, cast: torch.dtype) -> Side:
        arguments = [x.to(cast).requires_grad_() for x in inputs]
        seed = dy.to(cast).requires_grad_()
        seeds = [x.to(cast) for x in cotangents]
        return lambda: outputs(f, mode, arguments, seed, seeds)

    def named(backend: str) -> Op:
        return lambda *arguments: op(*arguments, backend=backend)

    backends = ops.backends(op.__name__, *inputs)
    names = [name for name, state in backends.items() if name != "torch" and "cannot run" not in state]
    sides = {name: side(named(name), dtype) for name in names}
    sides["plain"] = side(plain, dtype)
    layout = "channels_last" if channels_last else "contiguous"
    return compare(
        benchmark,
        f"{mode} {str(dtype).removeprefix('torch.')} {layout}",
        sides,
        expected=side(plain, torch.float64)(),
        baseline="plain",
        rounds=rounds,
    )
