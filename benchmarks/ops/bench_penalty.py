"""One gradient penalty with its weight gradients: our ops and the tangent method against plain PyTorch.

    pytest benchmarks/ops/bench_penalty.py --benchmark-only

The convolutional critic has 8 convolutions of 16 to 128 channels, leaky ReLUs and 2x2 average pooling, at 64 px, batch
8. The pggan critic has a quarter of its published widths at 64 px, batch 16, with a minibatch standard deviation, which
is not piecewise linear. Plain PyTorch pools after the convolution; our op does both in one strided convolution.

On a GPU also: the convolutional critic at a training size, 256 px, batch 64, bfloat16, channels_last; and the small one
captured in a CUDA graph, which removes launch overhead and compares the kernels alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import Row, compare
from fastgan import models, ops
from fastgan.models import pggan
from fastgan.nn import layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [3, 16, 16, 32, 32, 64, 64, 128, 128]


class Plain:
    """The functions of `torch.nn.functional` under the names of `fastgan.ops`."""

    @staticmethod
    def conv2d(x: Tensor, w: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
        return F.conv2d(x, w, bias, padding=padding)

    @staticmethod
    def bias_act(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
        return F.leaky_relu(x if bias is None else x + bias.view(-1, *[1] * (x.ndim - 2)), 0.2)

    @staticmethod
    def conv2d_downsample(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(F.conv2d(x, w, bias, padding=1), 2)

    @staticmethod
    def minibatch_stddev(x: Tensor, group_size: int = 4, num_features: int = 1) -> Tensor:
        with ops.use_backend("torch"):
            return ops.minibatch_stddev(x, group_size, num_features)

    avg_pool2d = staticmethod(F.avg_pool2d)
    linear = staticmethod(F.linear)


def convolutional(
    dtype: torch.dtype, batch: int = 8, size: int = 64
) -> tuple[list[Tensor], Tensor, Callable[[Any, list[Tensor], Tensor], Tensor]]:
    """Weights, images and the critic as a function of a module of ops, weights and images."""
    weights = [torch.randn(o, i, 3, 3) * (2 / (9 * i)) ** 0.5 for i, o in itertools.pairwise(WIDTHS)]
    biases = [torch.zeros(o) for o in WIDTHS[1:]]
    last = torch.randn(1, 128) * 0.1

    def critic(f: Any, parameters: list[Tensor], x: Tensor) -> Tensor:
        *parameters, last = parameters
        for i in range(8):
            x = f.conv2d(x, parameters[i], parameters[8 + i], padding=1)
            x = f.bias_act(x, None, "lrelu")
            if i % 2:
                x = f.avg_pool2d(x, 2)
        return f.linear(x.mean((2, 3)), last)

    images = torch.randn(batch, 3, size, size)
    return [t.to(DEVICE, dtype) for t in (*weights, *biases, last)], images.to(DEVICE, dtype), critic


def progressive(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Callable[[Any, list[Tensor], Tensor], Tensor]]:
    _, network = models.build("pggan", resolution=64, channels=3, latent=4, fmap_base=2048, fmap_max=128)
    network = network.to(DEVICE, dtype)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    weights = dict(network.named_parameters())

    def critic(f: Any, parameters: list[Tensor], x: Tensor) -> Tensor:
        with mock.patch.object(layers, "ops", f), mock.patch.object(pggan, "ops", f):
            return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (x,))

    return [weights[n].detach() for n in names], torch.randn(16, 3, 64, 64).to(DEVICE, dtype), critic


CRITICS = {"convolutional": convolutional, "pggan": progressive}


Problem = tuple[list[Tensor], Tensor, Callable[[Any, list[Tensor], Tensor], Tensor]]
Sides = dict[str, Callable[[], list[Tensor]]]


def sides(make: Callable[[torch.dtype], Problem], dtype: torch.dtype, layout: str) -> Sides:
    """One penalty and its weight gradients for each side, on the same weights and images for every dtype."""
    torch.manual_seed(0)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    parameters, x, critic = make(dtype)
    parameters, x = (
        [p.to(memory_format=form).requires_grad_() if p.ndim == 4 else p.requires_grad_() for p in parameters],
        x.to(memory_format=form),
    )
    weight = torch.zeros(len(x), device=DEVICE)

    def penalty(f: Any, method: str) -> list[Tensor]:
        value = ops.gradient_penalty(lambda t: critic(f, parameters, t), x, x, weight=weight, method=method)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return [value.detach(), *(g for g in gradients if g is not None and g.ndim > 1)]

    return {
        "lean": lambda: penalty(ops, "reverse"),
        "tangent": lambda: penalty(ops, "tangent"),
        "plain": lambda: penalty(Plain, "reverse"),
    }


def compare_penalties(
    benchmark: Any, case: str, by_name: Sides, make: Callable[[torch.dtype], Problem], layout: str, memory: bool = True
) -> Row:
    return compare(
        benchmark,
        case,
        by_name,
        expected=sides(make, torch.float64, layout)["plain"](),
        baseline="plain",
        # If rounding moves a pre-activation across zero, the slope of a ReLU flips and the gradient jumps.
        floor=1e-3,
        rounds=15,
        memory=memory,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CRITICS)
def test_penalty(benchmark: Any, name: str, dtype: torch.dtype, layout: str) -> None:
    make = CRITICS[name]
    case = f"{name} {dtype} {layout}".replace("torch.", "")
    compare_penalties(benchmark, case, sides(make, dtype, layout), make, layout)


@pytest.mark.skipif(DEVICE == "cpu", reason="batches of 64 images of 256 px need a GPU")
def test_penalty_at_256_px(benchmark: Any) -> None:
    make = functools.partial(convolutional, batch=64, size=256)
    by_name = sides(make, torch.bfloat16, "channels_last")
    compare_penalties(benchmark, "convolutional 64 x 256 px bfloat16 channels_last", by_name, make, "channels_last")


def captured(side: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """`side` as the replay of a CUDA graph, which overwrites its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels and cuBLAS workspaces are created before the capture
            side()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = side()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_penalty_in_a_cuda_graph(benchmark: Any, dtype: torch.dtype, layout: str) -> None:
    by_name = sides(convolutional, dtype, layout)
    by_name = {name: captured(by_name[name]) for name in ("lean", "plain")}
    case = f"convolutional {dtype} {layout}, captured".replace("torch.", "")
    # The memory of a graph is allocated before the replay, so there is no peak to measure.
    compare_penalties(benchmark, case, by_name, convolutional, layout, memory=False)
