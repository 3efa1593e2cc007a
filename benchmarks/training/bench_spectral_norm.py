"""Spectral norm after `fastgan.nn.convert` beside torch's own.

    pytest benchmarks/training/bench_spectral_norm.py --benchmark-only

The weights of a critic's layers alone, computed as a forward does, and their gradients: what a step takes besides its
convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastgan.nn
from benchmarks.side_by_side import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STYLES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrization": parametrizations.spectral_norm,
    "hook": nn.utils.spectral_norm,
}


class Weights(nn.Module):
    """The weights of 16 convolutions of 3x3 and as many of 1x1, and of a linear layer, as a forward gets them."""

    def __init__(self, width: int, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        convs = [nn.Conv2d(width, width, k) for _ in range(16) for k in (3, 1)]
        self.layers = nn.ModuleList(STYLES[style](m) for m in (*convs, nn.Linear(width, 1)))

    def forward(self) -> list[Tensor]:
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        return [layer.weight for layer in self.layers]  # type: ignore[misc]


@pytest.mark.benchmark(group="spectral norm of 33 layers, and its gradient")
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("style", STYLES)
def test_spectral_norm(benchmark: Any, style: str, width: int) -> None:
    def side(dtype: torch.dtype, converted: bool) -> Callable[[], list[Tensor]]:
        model = Weights(width, style).to(DEVICE, dtype)
        if converted:
            fastgan.nn.convert(model)
        parameters = [p for p in model.parameters() if p.ndim > 1]
        start = [b.clone() for b in model.buffers()]
        ones = torch.ones((), device=DEVICE, dtype=dtype)

        def run() -> list[Tensor]:
            for buffer, value in zip(model.buffers(), start, strict=True):
                buffer.copy_(value)
            weights = model()
            gradients = torch.autograd.grad(weights, parameters, [ones.expand_as(w) for w in weights])
            return [torch.cat([t.flatten() for t in it]) for it in (weights, gradients)]

        return run

    sides = {"converted": side(torch.float32, True), "plain": side(torch.float32, False)}
    exact = side(torch.float64, False)()
    compare(benchmark, f"{style}, width {width}", sides, expected=exact, baseline="plain", floor=1e-5)
