"""SAGAN's discriminator step with a gradient penalty: our attention against torch's math backend, and plain PyTorch.

    pytest benchmarks/training/bench_sagan_step.py --benchmark-only

A step is that of `fastgan train --variant sagan --regularizer gradient-penalty`: fake images, hinge loss, penalty, all
weight gradients. Sides: `ours`; `math`, with torch's attention in both networks, on its math backend, the only one with
a second derivative; `plain`, with plain PyTorch for all other ops as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.side_by_side import compare
from fastgan import models, objectives, ops
from fastgan.training.step import Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Resolution of the images, resolution of the attention, batch size. Channels are a quarter of the published ones.
CASES = [(64, 32, 8), (128, 64, 2)]
WIDTH, LATENT = 16, 128


class Wide(nn.Module):
    """A generator in float64, for the float32 latents of a step."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator, self.latent = generator, LATENT

    def forward(self, latent: Tensor, labels: Tensor | None) -> Tensor:
        return self.generator(latent.double(), labels)


def math_form(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    with mock.patch.object(ops, "scaled_dot_product_attention", math_form):
        yield


@contextlib.contextmanager
def all_plain() -> Iterator[None]:
    with plain_attention(), ops.use_backend("torch"):
        yield


def gradients(dtype: torch.dtype, resolution: int, attention_at: int, batch: int) -> Callable[[], list[Tensor]]:
    """A step that returns the loss and the discriminator's weight gradients, the same at every call."""
    torch.manual_seed(0)
    generator, discriminator = models.build(
        "sagan", resolution=resolution, channels=3, latent=LATENT, width=WIDTH, attention_at=attention_at, max_width=256
    )
    for network in (generator, discriminator):
        network.to(DEVICE, dtype)
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):  # attention is off initially
                nn.init.constant_(parameter, 0.5)
    step = Step(
        generator if dtype == torch.float32 else Wide(generator),
        discriminator,
        loss=objectives.hinge(),
        penalty=(10.0, objectives.gradient_penalty),
    )
    real = torch.randn(batch, 3, resolution, resolution).clamp(-1, 1).to(DEVICE, dtype)
    positions = torch.arange(batch, device=DEVICE)
    # Every step updates the running estimates of spectral norm and batch norm; they are restored.
    running = [*generator.buffers(), *discriminator.buffers()]
    start = [buffer.clone() for buffer in running]
    parameters = list(discriminator.parameters())

    def run() -> list[Tensor]:
        with torch.no_grad():
            for buffer, value in zip(running, start, strict=True):
                buffer.copy_(value)
        loss, _ = step.discriminator_loss(real, positions)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    return run


@pytest.mark.parametrize(("resolution", "attention_at", "batch"), CASES)
@pytest.mark.benchmark(group="SAGAN's discriminator, a step with gradient penalty")
def test_sagan_step(benchmark: Any, resolution: int, attention_at: int, batch: int) -> None:
    torch.set_flush_denormal(True)  # as in training: squares of small gradients underflow
    step = gradients(torch.float32, resolution, attention_at, batch)

    def step_with(form: Callable[[], contextlib.AbstractContextManager[None]]) -> list[Tensor]:
        with form():
            return step()

    with all_plain():
        expected = gradients(torch.float64, resolution, attention_at, batch)()
    compare(
        benchmark,
        f"{resolution} px, attention at {attention_at}, batch {batch}",
        {"ours": step, "math": lambda: step_with(plain_attention), "plain": lambda: step_with(all_plain)},
        expected=expected,
        baseline="math",
        # If rounding moves a pre-activation across zero, the slope of a ReLU flips and the gradient jumps.
        floor=1e-3,
        rounds=5,
    )
