from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgan import objectives, ops
from fastgan.objectives import clip_weights


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam])
def test_clip_weights_clamps_after_each_step(make: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.Linear(3, 1)]
    optimizer = make([{"params": layers[0].parameters()}, {"params": layers[1].parameters()}], lr=0.5)  # type: ignore[call-arg]
    clip_weights(optimizer, 0.05)
    before = layers[0].weight.detach().clone()
    assert before.abs().max() > 0.05  # nothing is clamped before a step
    for _ in range(2):
        optimizer.zero_grad()
        layers[1](layers[0](torch.ones(2, 4))).sum().backward()
        optimizer.step()
        for parameter in [*layers[0].parameters(), *layers[1].parameters()]:
            assert parameter.abs().max() <= 0.05
            assert parameter.requires_grad and parameter.is_leaf
    assert max(p.abs().max().item() for p in layers[0].parameters()) == pytest.approx(0.05)


def test_clip_weights_leaves_small_weights_alone() -> None:
    weight = nn.Parameter(torch.tensor([0.003, -0.004, 0.5, -0.5]))
    optimizer = torch.optim.SGD([weight], lr=0.001)
    clip_weights(optimizer, 0.01)
    weight.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.002, -0.005, 0.01, -0.01]))


def test_clip_weights_touches_only_its_optimizer() -> None:
    mine, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    clip_weights(torch.optim.SGD([mine], lr=0.1), 0.01)
    second = torch.optim.SGD([other], lr=0.1)
    other.grad = torch.zeros(2)
    second.step()
    assert torch.equal(other.detach(), torch.ones(2)) and torch.equal(mine.detach(), torch.ones(2))


def test_penalties_are_those_of_ops() -> None:
    for name in ("gradient_penalty", "wasserstein_divergence", "zero_centered_penalty"):
        assert getattr(objectives, name) is getattr(ops, name)


def test_real_penalty_is_r1() -> None:
    """Of the critic x^3 w it is the mean of |3 x^2 w|^2 over real samples, whatever the fakes and the place between."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    w = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_(True)

    def critic(x: torch.Tensor) -> torch.Tensor:
        return x**3 @ w

    penalty = objectives.real_penalty(critic, real, fake, weight=torch.rand(6, generator=generator))
    torch.testing.assert_close(penalty, (9 * real**4 * w**2).sum(dim=1).mean())
    (found,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(found, (18 * real**4 * w).mean(dim=0))
    assert torch.equal(penalty, objectives.real_penalty(critic, real, 9 * fake, weight=torch.zeros(6)))


@pytest.mark.parametrize(("weight", "converges"), [(0.0, False), (0.5, True)])
def test_real_penalty_makes_the_dirac_gan_converge(weight: float, converges: bool) -> None:
    """Data at 0, a generator at theta, a critic psi x: without R1 the two circle for ever (Mescheder 2018, sec. 2)."""
    psi, theta = torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    loss, real = objectives.wasserstein(), torch.zeros(1, 1, dtype=torch.float64)
    for _ in range(500):
        psi.requires_grad_(True)
        penalty = objectives.real_penalty(psi.mul, real, theta, weight=torch.ones(1))
        of_d = loss.discriminator(real @ psi, theta @ psi) + weight * penalty
        psi = (psi - 0.1 * torch.autograd.grad(of_d, psi)[0]).detach()
        theta.requires_grad_(True)
        theta = (theta - 0.1 * torch.autograd.grad(loss.generator(theta @ psi), theta)[0]).detach()
    distance = torch.hypot(psi, theta[0]).item()
    assert (distance < 1e-3) if converges else (distance > 1.0), distance


def test_both_penalty_is_r1_and_r2() -> None:
    random = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(6, 4, dtype=torch.float64, generator=random) for _ in range(2))

    def critic(x: torch.Tensor) -> torch.Tensor:
        return (x**3).sum(dim=1)

    penalty = objectives.both_penalty(critic, real, fake, weight=torch.rand(6))
    torch.testing.assert_close(penalty, (9 * real**4).sum(dim=1).mean() + (9 * fake**4).sum(dim=1).mean())
