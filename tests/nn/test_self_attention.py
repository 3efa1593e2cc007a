from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan.nn import SelfAttention2d


def direct(block: SelfAttention2d, x: Tensor) -> Tensor:
    """The block, one query position at a time."""
    query, key, value, out = (m.weight.flatten(1) for m in (block.query, block.key, block.value, block.output))
    n, _, h, w = x.shape
    result = x.clone()
    for s in range(n):
        keys, values = torch.einsum("kc,chw->khw", key, x[s]), torch.einsum("kc,chw->khw", value, x[s])
        if block.pool:
            keys, values = F.max_pool2d(keys, 2), F.max_pool2d(values, 2)
        keys, values = keys.flatten(1), values.flatten(1)
        for i in range(h):
            for j in range(w):
                logits = (query @ x[s, :, i, j]) @ keys
                weights = logits.exp() / logits.exp().sum()
                result[s, :, i, j] += block.gamma * (out @ (values @ weights))
    return result


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_matches_loops(pool: bool, normalized: bool) -> None:
    block = SelfAttention2d(16, pool, normalized).double().eval()
    with torch.no_grad():
        block.gamma.fill_(0.7)
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), direct(block, x))


def test_gamma_starts_at_zero_and_the_block_is_then_the_identity() -> None:
    block, x = SelfAttention2d(16), torch.randn(2, 16, 8, 8)
    assert block.gamma.item() == 0.0 and block.gamma.shape == ()
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.gamma.grad is not None and block.gamma.grad.abs() > 0  # it can leave 0


def test_feature_sizes_and_what_is_pooled() -> None:
    block = SelfAttention2d(32)
    shapes = {name: tuple(getattr(block, name).weight.shape) for name in ("query", "key", "value", "output")}
    assert shapes == {
        "query": (4, 32, 1, 1),
        "key": (4, 32, 1, 1),
        "value": (16, 32, 1, 1),
        "output": (32, 16, 1, 1),
    }
    assert all(getattr(block, name).bias is None for name in shapes)


def test_normalized_projections_have_norm_one() -> None:
    block, x = SelfAttention2d(16), torch.randn(2, 16, 4, 4)
    for _ in range(60):
        block(x)
    for name in ("query", "key", "value", "output"):
        top = torch.linalg.matrix_norm(getattr(block, name).weight.flatten(1), ord=2).item()
        assert top == pytest.approx(1.0, abs=1e-3)


def test_derivatives() -> None:
    block = SelfAttention2d(8).double().eval()
    with torch.no_grad():
        block.gamma.fill_(0.5)
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(block, x)
    assert gradgradcheck(block, x)


def test_rejects_too_few_channels() -> None:
    with pytest.raises(ValueError, match="channels must be at least 8, got 7"):
        SelfAttention2d(7)


@pytest.mark.parametrize("pool", [True, False])
def test_empty_batches(pool: bool) -> None:
    block, x = SelfAttention2d(8, pool), torch.zeros(0, 8, 4, 4, requires_grad=True)
    y = block(x)
    assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())
