from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgan import models, ops
from fastgan.models import pggan
from fastgan.nn import EqualizedConv2d
from fastgan.ops.arguments import is_channels_last
from fastgan.training.networks import inherit

TINY: dict[str, Any] = {"channels": 3, "latent": 6, "fmap_base": 64, "fmap_max": 8}


def build(resolution: int, seed: int = 0, **values: Any) -> tuple[pggan.Generator, pggan.Discriminator]:
    """Networks in float64 with every bias and weight off its initial value."""
    torch.manual_seed(seed)
    generator, discriminator = models.build("pggan", **{**TINY, "resolution": resolution, **values})
    assert isinstance(generator, pggan.Generator) and isinstance(discriminator, pggan.Discriminator)
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.3)
    return generator.double(), discriminator.double()


def latents(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def pictures(resolution: int, n: int = 4) -> torch.Tensor:
    return torch.randn(
        n, 3, resolution, resolution, dtype=torch.float64, generator=torch.Generator().manual_seed(resolution)
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_paper() -> None:
    """Table 2 of the paper: 23.1M in each network."""
    with torch.device("meta"):
        generator, discriminator = models.build(
            "pggan", resolution=1024, channels=3, latent=512, fmap_base=8192, fmap_max=512
        )
    assert count(generator) == 23_086_795
    assert count(discriminator) == 23_087_249


def test_feature_maps_of_the_paper() -> None:
    with torch.device("meta"):
        generator, _ = models.build("pggan", resolution=1024, channels=3, latent=512, fmap_base=8192, fmap_max=512)
    maps = {int(size): layer.weight.shape[1] for size, layer in generator.to_rgb.items()}  # type: ignore[union-attr]
    assert maps == {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


@pytest.mark.parametrize("resolution", [8, 16, 32])
@pytest.mark.parametrize("fused", [True, False])
def test_growing_at_alpha_zero_changes_nothing(resolution: int, fused: bool) -> None:
    small = build(resolution // 2, 1, fused_scale=fused)
    grown = build(resolution, 2, fused_scale=fused)
    for before, after in zip(small, grown, strict=True):
        inherit(after, before.state_dict())
        after.set_alpha(0.0)
    old = small[0](latents())
    torch.testing.assert_close(grown[0](latents()), F.interpolate(old, scale_factor=2, mode="nearest"))
    x = pictures(resolution)
    averaged = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(grown[1](x), small[1](averaged))


@pytest.mark.parametrize("resolution", [8, 16])
def test_alpha_one_is_the_newest_level_alone(resolution: int) -> None:
    for network, inputs in zip(build(resolution), (latents(), pictures(resolution)), strict=True):
        network.set_alpha(1.0)
        assert network.fade is False and network.alpha.item() == 1.0
        alone = network(inputs)
        network.fade = True  # the blend with weight 1
        torch.testing.assert_close(network(inputs), alone)
        network.set_alpha(0.5)
        assert network.fade is True
        assert (network(inputs) - alone).abs().max() > 1e-6


def test_output_is_linear_in_alpha_for_the_generator() -> None:
    generator, _ = build(16)
    values = {}
    for alpha in (0.0, 0.25, 1.0):
        generator.set_alpha(alpha)
        values[alpha] = generator(latents())
    torch.testing.assert_close(values[0.25], 0.75 * values[0.0] + 0.25 * values[1.0])


def test_scores_are_continuous_in_alpha() -> None:
    generator, discriminator = build(16)
    x = pictures(16)
    for network, inputs in ((generator, latents()), (discriminator, x)):
        outputs = []
        alphas = [0.0, 1e-4, 0.3, 0.3 + 1e-4, 1 - 1e-4, 1.0]
        for alpha in alphas:
            network.set_alpha(alpha)
            outputs.append(network(inputs).detach())
        whole = (outputs[-1] - outputs[0]).abs().max()
        assert whole > 1e-3
        for low, high in ((0, 1), (2, 3), (4, 5)):
            assert (outputs[high] - outputs[low]).abs().max() < 0.01 * whole + 1e-3


def test_alpha_is_saved_and_has_no_gradient() -> None:
    generator, discriminator = build(8)
    for network in (generator, discriminator):
        network.set_alpha(0.25)
        assert network.state_dict()["alpha"].item() == 0.25
        assert "alpha" not in dict(network.named_parameters())


def test_4x4_has_no_level_to_fade_from() -> None:
    for network, inputs in zip(build(4), (latents(), pictures(4)), strict=True):
        before = network(inputs)
        network.set_alpha(0.0)
        assert network.fade is False
        torch.testing.assert_close(network(inputs), before)


def test_fused_and_separate_scale_changes() -> None:
    """The generator is the same function either way; the discriminator activates before or after its average."""
    fused, separate = build(16, 3), build(16, 3, fused_scale=False)
    for a, b in zip(fused, separate, strict=True):
        b.load_state_dict(a.state_dict())
    torch.testing.assert_close(separate[0](latents()), fused[0](latents()))
    x = pictures(16)
    assert separate[1](x).shape == (4,)
    assert (separate[1](x) - fused[1](x)).abs().max() > 1e-6
    assert separate[0](latents()).shape == (5, 3, 16, 16)


def test_idle_rgb_layers_are_frozen_and_the_others_are_not() -> None:
    for resolution, live in ((4, {4}), (8, {4, 8}), (32, {16, 32})):
        generator, discriminator = build(resolution)
        for rgb in (generator.to_rgb, discriminator.from_rgb):
            trained = {int(size) for size, layer in rgb.items() if layer.weight.requires_grad}
            biased = {int(size) for size, layer in rgb.items() if layer.bias.requires_grad}
            assert trained == biased == live
        frozen = [name for name, p in generator.named_parameters() if not p.requires_grad]
        assert all(name.startswith("to_rgb.") for name in frozen)


def test_every_trained_weight_has_a_gradient_while_fading() -> None:
    for network, inputs in zip(build(16), (latents(), pictures(16)), strict=True):
        network.set_alpha(0.5)
        network(inputs).sum().backward()
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_latents_are_normalized() -> None:
    generator, _ = build(8)
    torch.testing.assert_close(generator(5 * latents()), generator(latents()), rtol=1e-6, atol=1e-6)


def test_generator_against_its_definition() -> None:
    """Two levels written out from table 2 and section 4, without the package's layers."""
    generator, _ = build(8)
    state = copy.deepcopy(generator.state_dict())

    def conv(x: torch.Tensor, name: str, gain: float = 2**0.5) -> torch.Tensor:
        w, b = state[f"{name}.weight"], state[f"{name}.bias"]
        fan_in = w.shape[1] * w.shape[2] * w.shape[3]
        return F.conv2d(x, w * (gain / fan_in**0.5), b, padding=w.shape[2] // 2)

    def rectify(x: torch.Tensor) -> torch.Tensor:
        x = torch.where(x > 0, x, 0.2 * x)
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()

    z = latents()
    z = z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    # A dense layer to 4x4 is a 4x4 convolution of a 1x1 map, whose fan in counts the 16 weights of each filter tap.
    w, b = state["input.weight"], state["input.bias"]
    x = rectify((z @ w.T * (2**0.5 / 4 / w.shape[1] ** 0.5) + b).view(5, -1, 4, 4))
    x = rectify(conv(x, "conv"))
    x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    x = rectify(conv(x, "blocks.8.conv1"))
    x = rectify(conv(x, "blocks.8.conv2"))
    torch.testing.assert_close(generator(latents()), conv(x, "to_rgb.8", gain=1.0))


def test_discriminator_against_its_definition() -> None:
    _, discriminator = build(8, fused_scale=False)
    state = discriminator.state_dict()

    def scaled(name: str, gain: float) -> tuple[torch.Tensor, torch.Tensor]:
        w = state[f"{name}.weight"]
        return w * (gain / w[0].numel() ** 0.5), state[f"{name}.bias"]

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        w, b = scaled(name, 2**0.5)
        x = F.conv2d(x, w, b, padding=w.shape[2] // 2)
        return torch.where(x > 0, x, 0.2 * x)

    x = pictures(8)
    expected = conv(conv(conv(x, "from_rgb.8"), "blocks.8.conv1"), "blocks.8.conv2")
    expected = ops.minibatch_stddev(F.avg_pool2d(expected, 2))
    expected = conv(expected, "conv").flatten(1)
    w, b = scaled("dense", 2**0.5)
    expected = F.leaky_relu(expected @ w.T + b, 0.2)
    w, b = scaled("output", 1.0)
    torch.testing.assert_close(discriminator(x), (expected @ w.T + b)[:, 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_of_a_progressive_critic_are_in_its_memory_format(channels: int) -> None:
    """With images of one channel too, whose strides do not tell the format."""
    critic = pggan.Discriminator(resolution=16, channels=channels, fmap_base=64, fmap_max=8).to(
        memory_format=torch.channels_last
    )
    critic.set_alpha(0.5)
    formats: list[bool] = []
    for module in critic.modules():
        if isinstance(module, EqualizedConv2d):
            module.register_forward_hook(lambda _, __, y: formats.append(is_channels_last(y)))
    torch.manual_seed(0)
    images = torch.randn(4, channels, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    scores = critic(images)
    assert len(formats) == 7 and all(formats)
    plain = copy.deepcopy(critic).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(scores, plain(images))
    found, expected = (torch.autograd.grad(y.sum(), images, create_graph=True)[0] for y in (scores, plain(images)))
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(g.square().sum(), [p for p in net.parameters() if p.requires_grad], allow_unused=True)
        for g, net in ((found, critic), (expected, plain))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
