"""R1 in adversarial post-training of a diffusion transformer, whose discriminator is a copy of it with a head.

As in adversarial post-training for one-step generation (Lin et al. 2025), where R1 is approximated, as fused
attention has no second derivative. Here it is exact.

pip install diffusers
python examples/integrations/diffusion_r1.py
"""

from __future__ import annotations

import copy

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import fastgan.nn
from fastgan import ops
from fastgan.integrations import diffusers as integration

SIZES = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 16}
REST = {"patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4}
GAMMA = 1.0


class Discriminator(nn.Module):
    """The diffusion transformer, and a linear head on what it predicts: images [N, 4, 16, 16], labels [N] -> [N]."""

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer, self.head = copy.deepcopy(transformer), nn.Linear(4 * 16 * 16, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        predicted = predict(self.transformer, images, labels, 0)
        return self.head(predicted.flatten(1))[:, 0]


def predict(transformer: DiTTransformer2DModel, images: Tensor, labels: Tensor, time: int) -> Tensor:
    return transformer(images, timestep=torch.full_like(labels, time), class_labels=labels).sample


def main() -> None:
    torch.manual_seed(0)
    generator = DiTTransformer2DModel(**SIZES, **REST)
    discriminator = Discriminator(generator)
    print(integration.convert(discriminator))  # attention processors
    print(fastgan.nn.convert(discriminator))  # layers
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4)
    real, labels = torch.randn(4, 4, 16, 16), torch.randint(10, (4,))
    for step in range(3):
        with torch.no_grad():
            noise = torch.randn_like(real)
            fake = noise - predict(generator, noise, labels, 999)
        scores = discriminator(real, labels), discriminator(fake, labels)
        r1 = ops.zero_centered_penalty(lambda x: discriminator(x, labels), real)
        loss = nn.functional.softplus(-scores[0]).mean() + nn.functional.softplus(scores[1]).mean() + GAMMA / 2 * r1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, R1 {r1.item():.2e}")


if __name__ == "__main__":
    main()
