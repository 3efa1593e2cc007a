"""A gradient penalty on a vision transformer of timm: two lines change an existing critic.

pip install timm
python examples/integrations/vit_critic.py
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer

import fastgan.nn
from fastgan import ops

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 1}


def main() -> None:
    torch.manual_seed(0)
    critic = VisionTransformer(**SIZES)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    real, fake = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
    try:
        ops.gradient_penalty(critic, real, fake).backward()
    except RuntimeError as error:
        print("timm alone:", str(error).splitlines()[0])
    print(fastgan.nn.convert(critic))
    for step in range(3):
        penalty = ops.gradient_penalty(critic, real, fake)
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, penalty {penalty.item():.3f}")


if __name__ == "__main__":
    main()
