"""Four critics before and after `fastgan.nn.convert`: a penalty alone, a whole training step, a step without a penalty.

    pytest benchmarks/training/bench_convert.py --benchmark-only

A whole step is the critic's loss, its gradient penalty, its Adam, the generator's loss and its Adam; weights and
moments are restored before each, on both sides. Groups have the geometric mean of the four.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgan.nn
from benchmarks.side_by_side import compare
from benchmarks.training.critics import CRITICS, generator
from fastgan import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LATENT = 64


class Training:
    """A critic and a generator that can do one step, again and again from the same state."""

    def __init__(self, name: str, dtype: torch.dtype, converted: bool) -> None:
        make, shape = CRITICS[name]
        torch.manual_seed(0)
        self.critic, self.generator = make().to(DEVICE, dtype), generator(shape, LATENT).to(DEVICE, dtype)
        self.real = torch.randn(shape).tanh().to(DEVICE, dtype)
        self.latent = torch.randn(shape[0], LATENT).to(DEVICE, dtype)
        self.weight = torch.linspace(0, 1, shape[0], device=DEVICE, dtype=dtype)
        if converted:
            fastgan.nn.convert(self.critic)
        self.weights = [p for p in self.critic.parameters() if p.requires_grad]
        adams = (torch.optim.Adam(self.weights, 1e-4), torch.optim.Adam(self.generator.parameters(), 1e-4))
        self.critic_adam, self.generator_adam = adams
        self.state = [t for m in (self.critic, self.generator) for t in (*m.parameters(), *m.buffers())]
        self.start = [t.detach().clone() for t in self.state]

    def restore(self, buffers_alone: bool = False) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.state, self.start, strict=True):
                if not (buffers_alone and isinstance(tensor, nn.Parameter)):
                    tensor.copy_(value)
        for adam in (self.critic_adam, self.generator_adam):
            adam.state.clear()

    def penalty(self) -> list[Tensor | None]:
        self.restore(buffers_alone=True)  # it changes no weight, and a copy of all would be a tenth of a small one
        fake = self.real.flip(0)
        value = ops.gradient_penalty(self.critic, self.real, fake, weight=self.weight)
        gradients = torch.autograd.grad(value, self.weights, allow_unused=True)
        return [value.detach(), *(g if g is not None and g.ndim > 1 else None for g in gradients)]

    def step(self, penalty: bool) -> list[Tensor]:
        self.restore()
        fake = self.generator(self.latent).detach()
        loss = self.critic(fake).mean() - self.critic(self.real).mean()
        if penalty:
            loss = loss + 10 * ops.gradient_penalty(self.critic, self.real, fake, weight=self.weight)
        self.critic_adam.zero_grad()
        loss.backward()
        self.critic_adam.step()
        self.critic.requires_grad_(False)
        generator_loss = -self.critic(self.generator(self.latent)).mean()
        self.generator_adam.zero_grad()
        generator_loss.backward()
        self.generator_adam.step()
        for p in self.weights:
            p.requires_grad_(True)
        return [loss.detach(), generator_loss.detach()]


def sides(name: str, run: Callable[[Training], Any]) -> tuple[dict[str, Callable[[], Any]], Any]:
    """Both sides in float32, and the exact result."""
    exact = run(Training(name, torch.float64, False))
    lean, plain = (Training(name, torch.float32, converted) for converted in (True, False))
    return {"converted": lambda: run(lean), "plain": lambda: run(plain)}, copy.deepcopy(exact)


def _compare(benchmark: Any, name: str, run: Callable[[Training], Any]) -> None:
    by_name, exact = sides(name, run)
    # If rounding moves a pre-activation across zero, the slope of a ReLU flips and the gradient jumps.
    compare(benchmark, name, by_name, expected=exact, baseline="plain", floor=5e-3, rounds=9)


@pytest.mark.benchmark(group="a penalty and its weight gradients")
@pytest.mark.parametrize("name", CRITICS)
def test_penalty(benchmark: Any, name: str) -> None:
    _compare(benchmark, name, Training.penalty)


@pytest.mark.benchmark(group="a whole step with a penalty")
@pytest.mark.parametrize("name", CRITICS)
def test_step(benchmark: Any, name: str) -> None:
    _compare(benchmark, name, lambda training: training.step(True))


@pytest.mark.benchmark(group="a whole step without a penalty")
@pytest.mark.parametrize("name", CRITICS)
def test_step_without_penalty(benchmark: Any, name: str) -> None:
    _compare(benchmark, name, lambda training: training.step(False))
