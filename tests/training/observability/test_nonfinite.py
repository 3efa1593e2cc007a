from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastgan.training.observability.nonfinite import NonFiniteDetector


def watched_network() -> tuple[NonFiniteDetector, nn.Sequential]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    detector = NonFiniteDetector(torch.device("cpu"))
    detector.watch("discriminator", network)
    return detector, network


def step(detector: NonFiniteDetector, number: int, loss: Tensor, name: str = "loss of the discriminator") -> None:
    detector.begin_step(number)
    loss.backward()
    detector.loss(name, loss)
    detector.close_step()


def first_bad(detector: NonFiniteDetector) -> tuple[int, str] | None:
    return detector.first_bad(detector.pending())


def test_finite_stays_none() -> None:
    detector, network = watched_network()
    assert first_bad(detector) is None
    for number in range(5):
        step(detector, number, network(torch.full((3, 2), 1e18)).square().mean())
    assert first_bad(detector) is None
    assert detector.pending().shape == (5,)


def test_nothing_watched() -> None:
    detector = NonFiniteDetector(torch.device("cpu"))
    detector.begin_step(0)
    detector.close_step()
    assert first_bad(detector) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_names_the_first_step_and_the_gradient(bad: float) -> None:
    detector, network = watched_network()
    x = torch.ones(3, 2)
    for number in range(3):
        step(detector, number, network(x).mean())
    detector.begin_step(3)
    loss = network(x).mean()
    network[1].bias.register_hook(lambda gradient: gradient * bad)
    detector.watch("critic", network[1])  # sees the gradient behind the hook above
    loss.backward()
    detector.loss("loss of the discriminator", loss)
    detector.close_step()
    assert first_bad(detector) == (3, "gradient of critic.bias")
    step(detector, 4, network(x).mean())
    assert first_bad(detector) == (3, "gradient of critic.bias")


def test_one_bad_element_is_enough() -> None:
    detector, network = watched_network()
    detector.begin_step(7)
    weights = torch.ones(2, 2)
    weights[1, 0] = math.nan
    (network[0].weight * weights).sum().backward()
    detector.close_step()
    assert first_bad(detector) == (7, "gradient of discriminator.0.weight")


def test_loss_comes_before_gradients_of_the_same_step() -> None:
    detector, network = watched_network()
    step(detector, 2, network(torch.full((3, 2), math.nan)).mean())
    assert first_bad(detector) == (2, "loss of the discriminator")
    assert (detector.pending() == 2).sum() == 3  # and the gradients of both weights; those of the biases are finite


def test_keeps_the_earliest() -> None:
    detector, network = watched_network()
    detector.begin_step(1)
    (network[0].bias * math.inf).sum().backward()
    detector.close_step()
    for number in (2, 3):
        step(detector, number, network(torch.full((3, 2), math.nan)).mean())
    assert first_bad(detector) == (1, "gradient of discriminator.0.bias")


def test_losses_by_name() -> None:
    detector, network = watched_network()
    x = torch.ones(3, 2)
    step(detector, 0, network(x).mean(), "loss of the discriminator")
    step(detector, 0, network(x).mean(), "loss of the generator")
    detector.begin_step(1)
    detector.loss("loss of the generator", torch.tensor(math.inf))
    detector.close_step()
    assert first_bad(detector) == (1, "loss of the generator")


def test_sees_through_a_penalty() -> None:
    """The gradient of a penalty reaches the weights through a double backward; its NaN must be detected too."""
    detector, network = watched_network()
    detector.begin_step(0)
    x = torch.zeros(2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    (slope.square().sum() - slope.square().sum().detach()).sqrt().backward()  # sqrt at 0: 0 * inf
    detector.close_step()
    bad = first_bad(detector)
    assert bad is not None and bad[0] == 0 and bad[1].startswith("gradient of discriminator.")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_are_read_at_once_where_no_hook_sees_them(bad: float) -> None:
    network = nn.Linear(2, 1)
    detector = NonFiniteDetector(torch.device("cpu"))
    detector.watch("critic", network, hooks=False)
    first = detector.pending()
    for number, factor in enumerate((1.0, bad, 1.0)):
        detector.begin_step(number)
        (network.bias * factor).sum().backward()  # the weight has no gradient
        detector.gradients("critic")
        detector.close_step()
        network.zero_grad()
    assert first_bad(detector) == (1, "gradient of critic.bias")
    assert detector.pending() is first  # changed in place: a recorded step goes on writing it


def test_networks_that_are_frozen_between_steps_are_still_watched() -> None:
    detector, network = watched_network()
    for p in network.parameters():
        p.requires_grad_(False)
    for p in network.parameters():
        p.requires_grad_(True)
    detector.begin_step(4)
    (network[0].bias * math.nan).sum().backward()
    detector.close_step()
    assert first_bad(detector) == (4, "gradient of discriminator.0.bias")


def test_frozen_parameters_are_not_watched() -> None:
    network = nn.Linear(2, 1)
    network.bias.requires_grad_(False)
    detector = NonFiniteDetector(torch.device("cpu"))
    detector.watch("generator", network)
    assert detector.pending().shape == (1,)


def test_pending_of_ranks_is_reduced_by_minimum() -> None:
    """Rank 0 is finite, rank 1 had a NaN at step 5: both get the same from the minimum."""
    (finite, _), (bad, network) = watched_network(), watched_network()
    bad.begin_step(5)
    (network[1].bias * math.nan).sum().backward()
    bad.close_step()
    combined = torch.minimum(finite.pending(), bad.pending())
    assert combined.dtype == torch.int32
    assert finite.first_bad(combined) == bad.first_bad(combined) == (5, "gradient of discriminator.1.bias")


def test_half_precision_gradients_are_measured_in_float32() -> None:
    network = nn.Linear(2, 1).bfloat16()
    detector = NonFiniteDetector(torch.device("cpu"))
    detector.watch("generator", network)
    detector.begin_step(0)
    (network.weight * 1e38).sum().backward()
    detector.close_step()
    assert first_bad(detector) is None
