"""Networks and modules can be pickled, as DataLoader workers, `multiprocessing` and `torch.save` need."""

from __future__ import annotations

import copy
import io
import multiprocessing
import operator
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan import models
from fastgan.nn import Conv2d, SelfAttention2d, spectral_norm

SIZES: dict[str, Any] = {"resolution": 16, "channels": 3, "latent": 4, "width": 8, "max_width": 16}
SIZES |= {"fmap_base": 64, "fmap_max": 8, "num_classes": 3}


def build(model: str) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Both networks after a training step's forward, with their inputs."""
    generator, discriminator = models.build(model, **SIZES)
    labels = torch.tensor([0, 2])
    pairs = [(generator, (torch.randn(2, 4), labels)), (discriminator, (torch.randn(2, 3, 16, 16), labels))]
    for network, inputs in pairs:
        if model == "pggan":
            network.set_alpha(0.3)  # type: ignore[operator]
        network(*inputs)
    return pairs


def require_same(found: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert type(found).__qualname__ == type(network).__qualname__
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in network.parameters()]
    state, expected = found.state_dict(), network.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)
    for training in (True, False):
        assert torch.equal(found.train(training)(*inputs), network.train(training)(*inputs))


@pytest.mark.parametrize("model", models.MODELS)
def test_networks_survive_pickle_and_torch_save(model: str) -> None:
    for network, inputs in build(model):
        once = pickle.loads(pickle.dumps(network))
        file = io.BytesIO()
        torch.save(once, file)
        file.seek(0)
        twice = torch.load(file, weights_only=False)
        if model == "pggan":
            assert twice.fade and twice.alpha.item() == pytest.approx(0.3)
            twice.load_state_dict({**network.state_dict(), "alpha": torch.ones(())})
            assert not twice.fade
            twice.load_state_dict(network.state_dict())
        require_same(twice, network, inputs)
        require_same(copy.deepcopy(twice), network, inputs)


def test_networks_reach_a_spawned_process() -> None:
    pairs = [(network, inputs) for model in models.MODELS for network, inputs in build(model)]
    calls = [(network.eval().requires_grad_(False), *inputs) for network, inputs in pairs]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        results = pool.starmap_async(operator.call, calls).get(timeout=120)
    for (network, *inputs), found in zip(calls, results, strict=True):
        torch.testing.assert_close(found, network(*inputs))


def test_spectral_norm_is_that_of_torch() -> None:
    layer = nn.Linear(5, 4)
    theirs = torch.nn.utils.parametrizations.spectral_norm(copy.deepcopy(layer))
    torch.manual_seed(0)
    ours = spectral_norm(copy.deepcopy(layer))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(ours(x), theirs(x))
    restored = pickle.loads(pickle.dumps(ours))
    assert parametrize.is_parametrized(restored, "weight")
    parametrize.remove_parametrizations(restored.eval(), "weight")
    assert type(restored) is nn.Linear
    torch.testing.assert_close(restored.weight, ours.eval().weight)


def test_attention_and_layers_can_be_pickled() -> None:
    for module, channels in ((SelfAttention2d(8), 8), (spectral_norm(Conv2d(3, 4, 3)), 3)):
        x = torch.randn(2, channels, 4, 4)
        require_same(pickle.loads(pickle.dumps(module)), module, (x,))
