from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan import models
from fastgan.nn import Activation, SelfAttention2d

TINY: dict[str, dict[str, Any]] = {
    "mlp": {"width": 8},
    "dcgan": {"width": 4, "max_width": 8},
    "sagan": {"width": 8, "max_width": 16},
    "pggan": {"fmap_base": 32, "fmap_max": 8},
    "r3gan": {"width": 4, "max_width": 8},
}


def build(model: str, resolution: int = 16, channels: int = 3, **values: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    requested = {"latent": 6, **TINY[model], "resolution": resolution, "channels": channels, **values}
    return models.build(model, **requested)


CASES = [(m, r, c) for m in TINY for r in (4, 8, 16, 32, 64) for c in (1, 3) if r > 4 or m == "pggan"]


@pytest.mark.parametrize(("model", "resolution", "channels"), CASES)
def test_shapes(model: str, resolution: int, channels: int) -> None:
    generator, discriminator = build(model, resolution, channels)
    assert generator.latent == 6
    images = generator(torch.randn(3, 6))
    assert images.shape == (3, channels, resolution, resolution)
    scores = discriminator(images)
    assert scores.shape == (3,)
    scores.sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None or _idle(model, name, resolution), name
    if model not in ("pggan", "r3gan"):
        assert images.abs().max() <= 1


def _idle(model: str, name: str, resolution: int) -> bool:
    """Without a fade-in, the RGB layer of the level below takes no part."""
    return model == "pggan" and f"_rgb.{resolution // 2}." in name


@pytest.mark.parametrize("model", TINY)
def test_one_sample(model: str) -> None:
    generator, discriminator = (network.eval() for network in build(model))
    assert discriminator(generator(torch.randn(1, 6))).shape == (1,)


@pytest.mark.parametrize("model", TINY)
def test_scores_are_logits(model: str) -> None:
    """Nothing bounds a score: the last bias moves it one to one."""
    _, discriminator = build(model)
    discriminator.eval()
    x = torch.randn(4, 3, 16, 16)
    before = discriminator(x)
    (bias,) = [p for name, p in discriminator.named_parameters() if name.endswith("bias") and p.numel() == 1]
    with torch.no_grad():
        bias.add_(50.0)
    torch.testing.assert_close(discriminator(x), before + 50.0, rtol=1e-5, atol=1e-5)


def test_unknown_model() -> None:
    with pytest.raises(KeyError):
        models.build("stylegan", resolution=16, channels=3)


def test_same_seed_same_weights() -> None:
    for model in TINY:
        for a, b in zip(build(model), build(model), strict=True):
            for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
                assert torch.equal(x, y), name


def test_dcgan_has_no_bias_before_batch_norm() -> None:
    for resolution in (8, 64):
        for norm in ("batch", "none"):
            for network in build("dcgan", resolution, norm_g=norm, norm_d=norm):
                layers = list(network.layers)  # type: ignore[arg-type]
                pairs = itertools.pairwise(layers)
                followed = [m for m, after in pairs if isinstance(after, nn.BatchNorm2d)]
                assert all(m.bias is None for m in followed)
                free = [m for m in layers if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m not in followed]
                assert free and all(m.bias is not None for m in free)
                # A discriminator of 8 px has two layers, the image's and the score's: neither is normalized.
                single = resolution == 8 and isinstance(layers[0], nn.Conv2d)
                assert bool(followed) == (norm == "batch" and not single)


def test_sagan_has_no_bias_between_a_convolution_and_its_batch_norm() -> None:
    generator, _ = build("sagan", 32)
    blocks = list(generator.blocks.values())  # type: ignore[union-attr]
    assert len(blocks) == 3 and all(block.conv1.bias is None for block in blocks)


def test_dcgan_has_no_norm_at_the_image() -> None:
    """Radford et al., section 3: no batch norm at the generator's output and the discriminator's input."""
    generator, discriminator = build("dcgan", 32)
    assert isinstance(generator.layers[-1], nn.ConvTranspose2d)  # type: ignore[index]
    assert isinstance(discriminator.layers[1], Activation)  # type: ignore[index]


def test_dcgan_widths_double_towards_4x4_up_to_the_limit() -> None:
    _, discriminator = build("dcgan", 64, width=4, max_width=12)
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 8, 12, 12, 1]
    generator, _ = build("dcgan", 64, width=4, max_width=12)
    transposed = [m for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.out_channels for m in transposed] == [12, 12, 8, 4, 3]


def test_dcgan_initial_weights() -> None:
    for network in build("dcgan", 32, width=32, max_width=64, latent=64):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                count = module.weight.numel()
                assert module.weight.std().item() == pytest.approx(0.02, rel=5 / (2 * count) ** 0.5)
                assert module.weight.mean().item() == pytest.approx(0.0, abs=5 * 0.02 / count**0.5)
                assert module.bias is None or module.bias.abs().max() == 0
            elif isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
                assert 0.01 < module.weight.std().item() < 0.03
                assert module.bias.abs().max() == 0


def test_critic_without_norm_scores_each_sample_alone() -> None:
    _, critic = build("dcgan", norm_d="none")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in critic.modules())
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(critic(x)[2:3], critic(x[2:3]))


@pytest.mark.parametrize("resolution", [8, 32, 64])
def test_sagan_takes_labels(resolution: int) -> None:
    generator, discriminator = build("sagan", resolution, num_classes=4)
    generator.eval()
    discriminator.eval()
    latent = torch.randn(1, 6).expand(4, 6)
    labels = torch.arange(4)
    images = generator(latent, labels)
    assert images.shape == (4, 3, resolution, resolution)
    torch.testing.assert_close(images, images[:1].expand_as(images))  # gains start equal for all classes
    scores = discriminator(images, labels)
    assert scores.shape == (4,) and len(set(scores.tolist())) == 4
    # Projection: the label adds the inner product of its embedding with the features that the last layer also reads.
    features = []
    discriminator.output.register_forward_pre_hook(lambda _, args: features.append(args[0]))  # type: ignore[union-attr]
    scores = discriminator(images, labels)
    embedding: Tensor = discriminator.embedding.weight  # type: ignore[union-attr, assignment]
    base = discriminator.output(features[0]).squeeze(1)  # type: ignore[operator]
    torch.testing.assert_close(scores - base, (embedding * features[0]).sum(dim=1), rtol=1e-4, atol=1e-5)


def _with_class_gains(generator: nn.Module) -> None:
    for name, parameter in generator.named_parameters():
        if name.endswith("affine.weight"):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))


def test_sagan_labels_change_images_once_gains_differ() -> None:
    generator, _ = build("sagan", num_classes=3)
    generator.eval()
    _with_class_gains(generator)
    latent = torch.randn(1, 6).expand(3, 6)
    images = generator(latent, torch.arange(3))
    assert (images[0] - images[1]).abs().max() > 1e-3
    torch.testing.assert_close(generator(latent[:1], torch.tensor([2])), images[2:3], rtol=1e-4, atol=1e-5)


def normalized(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if parametrize.is_parametrized(m, "weight")]


def test_sagan_spectral_norm_is_on_every_layer_and_holds() -> None:
    for network in build("sagan", 16, num_classes=3):
        layers = normalized(network)
        every = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert {id(m) for m in every} <= {id(m) for m in layers}
        with torch.no_grad():  # far from the orthogonal start, so that the power iteration has something to do
            for layer in layers:
                original = layer.parametrizations.weight.original  # type: ignore[union-attr]
                original.copy_(3 * torch.randn_like(original))
        for _ in range(60):
            inputs = torch.randn(2, 6) if hasattr(network, "latent") else torch.randn(2, 3, 16, 16)
            network(inputs, torch.tensor([0, 1]))
        network.eval()
        for layer in layers:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            top = torch.linalg.matrix_norm(weight.flatten(1), ord=2).item()
            assert top == pytest.approx(1.0, rel=0.02), layer


def test_sagan_starts_orthogonal() -> None:
    """All singular values are 1, so that the first power iteration is already exact."""
    for network in build("sagan", 16):
        inputs = torch.randn(2, 6) if hasattr(network, "latent") else torch.randn(2, 3, 16, 16)
        network(inputs)
        attention = {
            id(m) for block in network.modules() if isinstance(block, SelfAttention2d) for m in block.modules()
        }
        for layer in normalized(network):
            if id(layer) not in attention:
                weight: Tensor = layer.weight  # type: ignore[assignment]
                values = torch.linalg.svdvals(weight.flatten(1))
                torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("resolution", "requested", "width"), [(8, None, 4), (32, None, 16), (64, None, 32), (32, 8, 8)]
)
def test_sagan_attention_is_at_the_requested_size(resolution: int, requested: int | None, width: int) -> None:
    for network in build("sagan", resolution, attention_at=requested):
        seen = []
        blocks = [m for m in network.modules() if isinstance(m, SelfAttention2d)]
        assert len(blocks) == 1 and blocks[0].gamma.item() == 0.0
        blocks[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[0].shape[2:])))
        network(torch.randn(2, 6) if hasattr(network, "latent") else torch.randn(2, 3, resolution, resolution))
        assert seen == [(width, width)]


def test_sagan_attention_starts_as_the_identity() -> None:
    for network in build("sagan", 16):
        network.eval()
        inputs = torch.randn(2, 6) if hasattr(network, "latent") else torch.randn(2, 3, 16, 16)
        before = network(inputs)
        (name,) = network.attention  # type: ignore[misc]
        with torch.no_grad():
            network.attention[name].gamma.fill_(1.0)  # type: ignore[index]
        assert (network(inputs) - before).abs().max() > 1e-6
        del network.attention[name]  # type: ignore[union-attr]
        torch.testing.assert_close(network(inputs), before)


def test_mlp_sizes() -> None:
    generator, discriminator = build("mlp", 8, 1, width=12)
    assert [m.out_features for m in generator.modules() if isinstance(m, nn.Linear)] == [12, 12, 64]
    assert [m.out_features for m in discriminator.modules() if isinstance(m, nn.Linear)] == [60, 60, 1]


def test_r3gan_sizes_are_the_papers() -> None:
    """Table 2 of Huang et al.: a generator of 20.78 M for CIFAR-10, and of 23.10 M for FFHQ-64."""
    for resolution, width, paper in ((32, 768, 20.78e6), (64, 384, 23.10e6)):
        with torch.device("meta"):
            pair = build("r3gan", resolution, latent=64, width=width, max_width=768)
        for network in pair:
            assert sum(p.numel() for p in network.parameters()) == pytest.approx(paper, rel=0.04)


@pytest.mark.parametrize("resolution", [8, 64])
def test_r3gan_starts_as_its_shortcuts(resolution: int) -> None:
    """The last convolution of a block is zero, so that both networks are linear at first, whatever their depth."""
    generator, discriminator = build("r3gan", resolution, 1, width=8, max_width=16)
    latent = torch.randn(5, 6)
    torch.testing.assert_close(generator(2 * latent), 2 * generator(latent))
    images = torch.randn(5, 1, resolution, resolution)
    torch.testing.assert_close(discriminator(2 * images), 2 * discriminator(images), rtol=1e-4, atol=1e-5)
    grouped = [m for network in (generator, discriminator) for m in network.modules() if getattr(m, "groups", 1) > 1]
    assert any(m.kernel_size == (3, 3) for m in grouped)  # type: ignore[union-attr]
    assert not any(isinstance(m, nn.BatchNorm2d) for network in (generator, discriminator) for m in network.modules())
