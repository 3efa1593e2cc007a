"""MAML's outer step through a transformer: the gradient of a loss after a step of gradient descent (Finn et al. 2017).

Each task is a line with a slope of its own. The model sees eight points of it, takes one step on them, and is judged by
another point. The outer gradient passes through the inner one, and so through attention twice.

python examples/integrations/maml.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastgan.nn

RATE = 0.05


class Regressor(nn.Module):
    """[N, points, 2] of pairs (x, y), the last one with y = 0, -> [N], the y of that point."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.read = nn.Linear(2, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 1)

    def forward(self, points: Tensor) -> Tensor:
        return self.read(self.encoder(self.embed(points))[:, -1])[:, 0]


def batch(slope: Tensor, points: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(16, points) * 2 - 1
    y = slope * x
    shown = torch.stack([x, y], dim=2)
    shown[:, -1, 1] = 0
    return shown, y[:, -1]


def after_a_step(model: nn.Module, slope: Tensor) -> Tensor:
    """Loss on new points of a task, after one step on others that autograd records."""
    weights = dict(model.named_parameters())
    shown, answer = batch(slope, 8)
    inner = (functional_call(model, weights, (shown,)) - answer).square().mean()
    gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    stepped = {name: w - RATE * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    shown, answer = batch(slope, 8)
    return (functional_call(model, stepped, (shown,)) - answer).square().mean()


def main() -> None:
    torch.manual_seed(0)
    model = Regressor()
    print(fastgan.nn.convert(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(3):
        loss = torch.stack([after_a_step(model, slope) for slope in torch.randn(4)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"outer step {step}: loss after an inner step {loss.item():.4f}")


if __name__ == "__main__":
    main()
