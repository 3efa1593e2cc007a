"""WGAN-GP and R1 for a critic of your own, each compiled with its double backward; what torch.compile says to the same.

python examples/compile_step.py
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastgan

critic = nn.Sequential(
    nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2),
    nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2),
    nn.Flatten(), nn.Linear(64 * 8 * 8, 1),
)  # fmt: skip


def wgan_gp(real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    x = torch.lerp(real, fake, weight).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + 10 * penalty


def r1(real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    real = real.clone().requires_grad_()
    score = critic(real)
    (gradient,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    loss = nn.functional.softplus(critic(fake)) + nn.functional.softplus(-score)
    return loss.mean() + 5 * gradient.square().flatten(1).sum(1).mean()


def milliseconds(step: Callable[[], object]) -> float:
    step()
    began = time.perf_counter()
    for _ in range(10):
        step()
    return 100 * (time.perf_counter() - began)


def main() -> None:
    torch.manual_seed(0)
    batch = torch.randn(32, 3, 32, 32), torch.randn(32, 3, 32, 32), torch.rand(32, 1, 1, 1)
    parameters = list(critic.parameters())
    for loss in (wgan_gp, r1):
        step = fastgan.compile_step(loss, parameters)  # the loss and the gradient of each parameter, compiled
        value, gradients = step(*batch)
        expected = torch.autograd.grad(loss(*batch), parameters)
        for gradient, reference in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5)
        eager = milliseconds(lambda loss=loss: torch.autograd.grad(loss(*batch), parameters))  # type: ignore[misc]
        compiled = milliseconds(lambda step=step: step(*batch))  # type: ignore[misc]
        print(f"{loss.__name__}: loss {value:.4f}; eager {eager:.1f} ms, compiled {compiled:.1f} ms")
    try:
        torch.compile(wgan_gp)(*batch).backward()
        print("torch.compile: no error in this version")
    except Exception as error:
        print("torch.compile:", next(line for line in str(error).splitlines() if line)[:110])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
