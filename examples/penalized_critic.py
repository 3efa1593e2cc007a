"""Attention in a critic with a gradient penalty: PyTorch's fused op has no second derivative on most devices, ours has.

python examples/penalized_critic.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan.ops import scaled_dot_product_attention


class Critic(nn.Module):
    """images [N, C, R, R] -> scores [N], with self-attention over the R/4 x R/4 places of a feature map."""

    def __init__(self, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 4, 2, 1)
        )
        self.to_qkv = nn.Linear(width, 3 * width)
        self.score = nn.Linear(width, 1)

    def forward(self, images: Tensor, attention=nn.functional.scaled_dot_product_attention) -> Tensor:  # type: ignore[no-untyped-def]
        places = self.stem(images).flatten(2).transpose(1, 2)  # [N, places, width]
        query, key, value = self.to_qkv(places).unsqueeze(1).chunk(3, dim=-1)
        return self.score(attention(query, key, value).mean(dim=(1, 2))).flatten()


def penalty(critic: Critic, images: Tensor, attention) -> Tensor:  # type: ignore[no-untyped-def]
    """The gradient penalty of Gulrajani et al. 2017, mean (|grad D| - 1)^2; its gradient has second derivatives."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(images, attention).sum(), images, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def main() -> None:
    torch.manual_seed(0)
    critic, images = Critic(), torch.randn(8, 3, 32, 32)
    for name, attention in (
        ("torch", nn.functional.scaled_dot_product_attention),
        ("fastgan", scaled_dot_product_attention),
    ):
        critic.zero_grad()
        try:
            value = penalty(critic, images, attention)
            value.backward()
            size = torch.stack([p.grad.norm() for p in critic.parameters() if p.grad is not None]).norm()
            print(f"{name}: penalty {value.item():.4f}, its gradient has norm {size.item():.4f}")
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0][:100]}")


if __name__ == "__main__":
    main()
