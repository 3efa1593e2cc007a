from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan.ops import scaled_dot_product_attention


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(*leading: int, n: int = 5, m: int = 3, d: int = 4, dv: int = 2) -> tuple[torch.Tensor, ...]:
    return random(*leading, n, d), random(*leading, m, d, seed=1), random(*leading, m, dv, seed=2)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_matches_loops(scale: float | None) -> None:
    q, k, v = inputs(2)
    actual = scaled_dot_product_attention(q, k, v, scale=scale)
    assert actual.shape == (2, 5, 2)
    factor = 1 / math.sqrt(4) if scale is None else scale
    for b in range(2):
        for i in range(5):
            weights = [
                math.exp(factor * sum(x * y for x, y in zip(q[b, i].tolist(), row, strict=True)))
                for row in k[b].tolist()
            ]
            for j in range(2):
                expected = sum(w * x for w, x in zip(weights, v[b, :, j].tolist(), strict=True)) / sum(weights)
                assert actual[b, i, j].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_matches_torch(leading: tuple[int, ...], scale: float | None) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(*leading, n=17, m=31, d=8, dv=8))
    ours = scaled_dot_product_attention(q, k, v, scale=scale)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(ours, theirs)
    seed = random(*ours.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), seed), torch.autograd.grad(theirs, (q, k, v), seed), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_leading_dimensions_broadcast() -> None:
    q, k, v = random(2, 1, 4, 3), random(3, 5, 3, seed=1), random(5, 2, seed=2)
    out = scaled_dot_product_attention(q, k, v)
    assert out.shape == (2, 3, 4, 2)
    torch.testing.assert_close(out[1, 2], scaled_dot_product_attention(q[1, 0], k[2], v))


def test_large_logits_stay_finite() -> None:
    q, k, v = inputs()
    out = scaled_dot_product_attention(q.float() * 1e4, k.float() * 1e4, v.float(), scale=1.0)
    best = (q @ k.T).argmax(dim=1)
    torch.testing.assert_close(out, v.float()[best])


def test_derivatives() -> None:
    args = tuple(t.requires_grad_() for t in inputs(2, n=3, m=2, d=2, dv=2))
    assert gradcheck(scaled_dot_product_attention, args)
    assert gradgradcheck(scaled_dot_product_attention, args)


def test_refusals() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="key: had feature size 3; it may be 4, as in query"):
        scaled_dot_product_attention(q, k[:, :3], v)
    with pytest.raises(ValueError, match="value: had length 2; it may be 3, as in key"):
        scaled_dot_product_attention(q, k, v[:2])
