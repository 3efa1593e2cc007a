from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastgan.training.observability.nonfinite import NonFiniteDetector


def watching() -> tuple[NonFiniteDetector, nn.Sequential]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    check = NonFiniteDetector(torch.device("cpu"))
    check.watch("discriminator", network)
    return check, network


def step(check: NonFiniteDetector, number: int, loss: Tensor, name: str = "loss of the discriminator") -> None:
    check.begin_step(number)
    loss.backward()
    check.loss(name, loss)
    check.close_step()


def found(check: NonFiniteDetector) -> tuple[int, str] | None:
    return check.first_bad(check.pending())


def test_finite_stays_none() -> None:
    check, network = watching()
    assert found(check) is None
    for number in range(5):
        step(check, number, network(torch.full((3, 2), 1e18)).square().mean())
    assert found(check) is None
    assert check.pending().shape == (5,)


def test_nothing_watched() -> None:
    check = NonFiniteDetector(torch.device("cpu"))
    check.begin_step(0)
    check.close_step()
    assert found(check) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_names_the_first_step_and_the_gradient(bad: float) -> None:
    check, network = watching()
    x = torch.ones(3, 2)
    for number in range(3):
        step(check, number, network(x).mean())
    check.begin_step(3)
    loss = network(x).mean()
    network[1].bias.register_hook(lambda gradient: gradient * bad)
    check.watch("critic", network[1])  # sees the gradient behind the hook above
    loss.backward()
    check.loss("loss of the discriminator", loss)
    check.close_step()
    assert found(check) == (3, "gradient of critic.bias")
    step(check, 4, network(x).mean())
    assert found(check) == (3, "gradient of critic.bias")


def test_one_bad_element_is_enough() -> None:
    check, network = watching()
    check.begin_step(7)
    weights = torch.ones(2, 2)
    weights[1, 0] = math.nan
    (network[0].weight * weights).sum().backward()
    check.close_step()
    assert found(check) == (7, "gradient of discriminator.0.weight")


def test_loss_comes_before_gradients_of_the_same_step() -> None:
    check, network = watching()
    step(check, 2, network(torch.full((3, 2), math.nan)).mean())
    assert found(check) == (2, "loss of the discriminator")
    assert (check.pending() == 2).sum() == 3  # and the gradients of both weights; those of the biases are finite


def test_keeps_the_earliest() -> None:
    check, network = watching()
    check.begin_step(1)
    (network[0].bias * math.inf).sum().backward()
    check.close_step()
    for number in (2, 3):
        step(check, number, network(torch.full((3, 2), math.nan)).mean())
    assert found(check) == (1, "gradient of discriminator.0.bias")


def test_losses_by_name() -> None:
    check, network = watching()
    x = torch.ones(3, 2)
    step(check, 0, network(x).mean(), "loss of the discriminator")
    step(check, 0, network(x).mean(), "loss of the generator")
    check.begin_step(1)
    check.loss("loss of the generator", torch.tensor(math.inf))
    check.close_step()
    assert found(check) == (1, "loss of the generator")


def test_sees_through_a_penalty() -> None:
    """The gradient of a penalty reaches the weights by another road; its NaN must be seen too."""
    check, network = watching()
    check.begin_step(0)
    x = torch.zeros(2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    (slope.square().sum() - slope.square().sum().detach()).sqrt().backward()  # sqrt at 0: 0 * inf
    check.close_step()
    bad = found(check)
    assert bad is not None and bad[0] == 0 and bad[1].startswith("gradient of discriminator.")


def test_networks_that_are_frozen_between_steps_are_still_watched() -> None:
    check, network = watching()
    for p in network.parameters():
        p.requires_grad_(False)
    for p in network.parameters():
        p.requires_grad_(True)
    check.begin_step(4)
    (network[0].bias * math.nan).sum().backward()
    check.close_step()
    assert found(check) == (4, "gradient of discriminator.0.bias")


def test_frozen_parameters_are_not_watched() -> None:
    network = nn.Linear(2, 1)
    network.bias.requires_grad_(False)
    check = NonFiniteDetector(torch.device("cpu"))
    check.watch("generator", network)
    assert check.pending().shape == (1,)


def test_pending_of_ranks_is_reduced_by_minimum() -> None:
    """Rank 0 is fine, rank 1 saw a NaN at step 5: both learn the same from the minimum."""
    (fine, _), (hurt, network) = watching(), watching()
    hurt.begin_step(5)
    (network[1].bias * math.nan).sum().backward()
    hurt.close_step()
    together = torch.minimum(fine.pending(), hurt.pending())
    assert together.dtype == torch.int32
    assert fine.first_bad(together) == hurt.first_bad(together) == (5, "gradient of discriminator.1.bias")


def test_half_precision_gradients_are_measured_in_float32() -> None:
    network = nn.Linear(2, 1).bfloat16()
    check = NonFiniteDetector(torch.device("cpu"))
    check.watch("generator", network)
    check.begin_step(0)
    (network.weight * 1e38).sum().backward()
    check.close_step()
    assert found(check) is None
