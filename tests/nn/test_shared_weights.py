"""`shared_weights`: a scaled weight is made once for all passes of a step, with the same losses and gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import models, ops
from fastgan.nn import EqualizedConv2d, EqualizedLinear
from fastgan.nn.shared_weights import shared_weights
from fastgan.objectives import gradient_penalty, wasserstein
from fastgan.training.step import Step


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def losses(shared: bool, dtype: torch.dtype, autocast: bool = False) -> tuple[list[Tensor], Counter[str]]:
    """Loss and gradients of a discriminator's step of pggan, and the operations it took."""
    torch.manual_seed(1)
    generator, discriminator = models.build("pggan", resolution=8, channels=1, latent=4, fmap_base=64, fmap_max=8)
    real = torch.randn(4, 1, 8, 8, dtype=dtype)
    step = Step(
        generator, discriminator.to(dtype), loss=wasserstein(), penalty=(10.0, gradient_penalty),
        precision="bf16" if autocast else "fp32",
    )  # fmt: skip
    method = Step.discriminator_loss if shared else Step.discriminator_loss.__wrapped__  # type: ignore[attr-defined]
    with Operations() as operations:
        loss, _ = method(step, real, torch.arange(4))
        gradients = torch.autograd.grad(
            loss, [p for p in discriminator.parameters() if p.requires_grad], allow_unused=True
        )
    return [loss, *(g for g in gradients if g is not None)], operations.seen


def test_losses_and_gradients_are_the_same() -> None:
    with ops.use_backend("torch"):
        for ours, plain in zip(losses(True, torch.float64)[0], losses(False, torch.float64)[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_a_weight_is_scaled_and_cast_once() -> None:
    (_, ours), (_, plain) = losses(True, torch.float32, True), losses(False, torch.float32, True)
    assert ours["_to_copy"] <= plain["_to_copy"] - 20 and ours["mul"] <= plain["mul"] - 20
    assert ours["convolution"] == plain["convolution"]


@pytest.mark.parametrize("layer", [EqualizedLinear(3, 2), EqualizedConv2d(3, 2, 1)])
def test_what_is_shared_ends_with_the_context(layer: torch.nn.Module) -> None:
    x = torch.randn(2, 3) if isinstance(layer, EqualizedLinear) else torch.randn(2, 3, 1, 1)
    with shared_weights():
        first = layer(x)
        with torch.no_grad():
            layer(x)  # a pass without gradients does not take theirs away
        assert layer(x).requires_grad and torch.equal(layer(x), first)
    with torch.no_grad():
        layer.weight.mul_(2.0)  # type: ignore[operator,union-attr]
    assert not torch.equal(layer(x), first)
    with shared_weights():
        assert not torch.equal(layer(x), first)
