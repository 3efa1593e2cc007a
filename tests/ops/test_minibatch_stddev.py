from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import minibatch_stddev


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def direct(x: torch.Tensor, group: int, features: int, eps: float) -> list[list[float]]:
    """The appended values, [N][features], sample by sample; `group` is the size in force."""
    n, c, h, w = x.shape
    values = x.tolist()
    groups, chunk = n // group, c // features
    appended = []
    for i in range(n):
        members = [j for j in range(n) if j % groups == i % groups]
        assert len(members) == group and i in members
        row = []
        for f in range(features):
            total = 0.0
            for channel in range(f * chunk, (f + 1) * chunk):
                for y in range(h):
                    for z in range(w):
                        seen = [values[j][channel][y][z] for j in members]
                        mean = sum(seen) / group
                        total += math.sqrt(sum((s - mean) ** 2 for s in seen) / group + eps)
            row.append(total / (chunk * h * w))
        appended.append(row)
    return appended


@pytest.mark.parametrize(
    ("n", "asked", "used", "features"),
    [
        (8, 4, 4, 1),  # two strided groups
        (12, 4, 4, 3),
        (4, 4, 4, 2),  # one group
        (6, 4, 3, 1),  # 4 does not divide 6; 3 is the largest divisor below it
        (5, 4, 1, 1),  # a prime batch: groups of one
        (5, 8, 5, 2),  # fewer samples than asked for
        (9, 8, 3, 6),
        (1, 4, 1, 1),
        (4, 1, 1, 1),
    ],
)
def test_matches_loops(n: int, asked: int, used: int, features: int) -> None:
    x = random(n, 6, 2, 3)
    y = minibatch_stddev(x, asked, features, eps=1e-3)
    assert y.shape == (n, 6 + features, 2, 3)
    assert torch.equal(y[:, :6], x)
    expected = torch.tensor(direct(x, used, features, 1e-3), dtype=torch.float64)
    torch.testing.assert_close(y[:, 6:], expected[:, :, None, None].expand(n, features, 2, 3), rtol=1e-12, atol=0)


def test_defaults_are_groups_of_four_and_one_feature() -> None:
    x = random(8, 3, 2, 2)
    expected = torch.tensor(direct(x, 4, 1, 1e-8), dtype=torch.float64)
    torch.testing.assert_close(minibatch_stddev(x)[:, 3:, 0, 0], expected, rtol=1e-12, atol=0)


def test_groups_do_not_see_each_other() -> None:
    x = random(8, 2, 2, 2).requires_grad_()
    minibatch_stddev(x, 4)[1, 2].sum().backward()
    assert x.grad is not None
    touched = [i for i in range(8) if x.grad[i].abs().max() > 0]
    assert touched == [1, 3, 5, 7]


@pytest.mark.parametrize(("n", "group", "features"), [(4, 2, 1), (3, 3, 2), (1, 4, 1)])
def test_derivatives(n: int, group: int, features: int) -> None:
    x = random(n, 2, 2, 1).requires_grad_()
    # With groups of one the variance is the constant eps, so eps must not be near the checker's step.
    assert gradcheck(lambda t: minibatch_stddev(t, group, features, eps=1e-2), x)
    assert gradgradcheck(lambda t: minibatch_stddev(t, group, features, eps=1e-2), x)


def test_equal_samples_have_finite_derivatives() -> None:
    x = random(1, 3, 2, 2).expand(4, 3, 2, 2).clone().requires_grad_()
    (first,) = torch.autograd.grad(minibatch_stddev(x)[:, 3:].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * random(4, 3, 2, 2, seed=1)).sum(), x)
    # The mean of four equal numbers is exact, so the deviation is 0, and so is the slope of its square.
    assert first.abs().max() < 1e-9
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # Squares of 300 overflow float16.
    x = (random(4, 2, 3, 3) * 300).to(dtype)
    y = minibatch_stddev(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, minibatch_stddev(x.double()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_refusals() -> None:
    x = torch.zeros(4, 6, 2, 2)
    with pytest.raises(ValueError, match=r"x: had 2 dimensions; it may be \[N, C, H, W\]"):
        minibatch_stddev(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="group_size: was 0; it may be 1 or more"):
        minibatch_stddev(x, 0)
    for features in (0, 4):
        with pytest.raises(ValueError, match=f"num_features: was {features}; it may be a divisor of the 6 channels"):
            minibatch_stddev(x, 4, features)
