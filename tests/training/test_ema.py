from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgan.training.ema import Ema


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("alpha", torch.ones(()))


def fill(network: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(value)


def test_decay() -> None:
    network = Network()
    fill(network, 1.0)
    ema = Ema(network, 0.9, warmup=False)
    fill(network, 2.0)
    expected = 1.0
    for _ in range(3):
        ema.update(network)
        expected = 0.9 * expected + 0.1 * 2.0
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected), msg=name)
    assert ema.steps.item() == 3


def test_statistics_are_averaged_and_other_buffers_copied() -> None:
    network = Network()
    fill(network, 0.0)
    ema = Ema(network, 0.5, warmup=False)
    fill(network, 4.0)
    ema.update(network)
    buffers = {name: b.float().mean().item() for name, b in ema.module.named_buffers()}
    assert buffers == {"norm.running_mean": 2.0, "norm.running_var": 2.0, "norm.num_batches_tracked": 4.0, "alpha": 4.0}
    fill(network, 9.0)
    assert ema.module.alpha.item() == 4.0  # a copy, not the same tensor


def test_power_iteration_vectors_are_copied() -> None:
    torch.manual_seed(0)
    network = spectral_norm(nn.Linear(3, 3))
    ema = Ema(network, 0.5, warmup=False)
    before = network.parametrizations.weight.original.detach().clone()
    with torch.no_grad():
        network.parametrizations.weight.original.add_(torch.randn(3, 3))
    network(torch.randn(2, 3))
    ema.update(network)
    ours, theirs = ema.module.state_dict(), network.state_dict()
    for name in ("_u", "_v"):
        key = f"parametrizations.weight.0.{name}"
        assert torch.equal(ours[key], theirs[key])
    key = "parametrizations.weight.original"
    torch.testing.assert_close(ours[key], (before + theirs[key]) / 2)


def test_warmup() -> None:
    network = Network()
    fill(network, 0.0)
    ema = Ema(network, 0.25, warmup=True)
    fill(network, 1.0)
    expected = 0.0
    for t in range(6):
        ema.update(network)
        decay = min(0.25, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay)
        assert ema.module.linear.weight[0, 0].item() == pytest.approx(expected, rel=1e-6)  # type: ignore[union-attr, index]
    assert (1 + 5) / (10 + 5) > 0.25 > 1 / 10  # both branches were taken


def test_the_average_is_apart_from_the_generator() -> None:
    network = Network().train()
    ema = Ema(network, 0.9, warmup=False)
    assert not ema.module.training and network.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in network.parameters())
    before = network.linear.weight.detach().clone()
    fill(ema.module, 5.0)
    assert torch.equal(network.linear.weight, before)
    ema.update(network)
    assert torch.equal(network.linear.weight, before)


def test_equal_weights_stay_equal() -> None:
    """The average of a constant is that constant to the last bit, however long."""
    torch.manual_seed(0)
    network = Network()
    ema = Ema(network, 0.999, warmup=False)
    for _ in range(100):
        ema.update(network)
    assert torch.equal(ema.module.linear.weight, network.linear.weight)  # type: ignore[union-attr, arg-type]
