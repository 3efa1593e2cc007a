"""Masks without a gradient: the form in blocks of rows against plain products, to second order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgan.ops import attention_chunked, backends, scaled_dot_product_attention

N, M, D = 20, 5, 4


def inputs(*leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(*leading, length, D, dtype=dtype).requires_grad_() for length in (N, M, M))
    return q, k, v


def derivatives(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, its gradients, and the gradients of the sum of their squares."""
    output = function(*tensors)
    first = torch.autograd.grad(output.pow(3).sum(), tensors, create_graph=True)
    return [output, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)]


def hidden(*shape: int) -> Tensor:
    mask = torch.rand(shape) > 0.3
    mask.reshape(-1, shape[-1])[0] = False  # a query without keys
    return mask


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("kind", ["bool", "float", "keys", "heads", "batch", "all"])
@pytest.mark.parametrize("block", [2**18, 2 * N * M, 1])  # all at once, two heads at a time, 16 rows at a time
def test_equals_plain_products(
    leading: tuple[int, ...], kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_chunked._BLOCK, "cpu", block)
    ones = (1,) * (len(leading) - 1)
    shape = {
        "bool": (N, M),
        "float": (N, M),
        "keys": (*leading[:1], *ones, 1, M),
        "heads": (*ones, *leading[-1:], N, M),
        "batch": (*leading[:1], *ones, N, M),
        "all": (*leading, N, M),
    }[kind]
    mask = torch.randn(shape, dtype=torch.float64) if kind == "float" else hidden(*shape)
    tensors = inputs(*leading)
    ours = derivatives(lambda *x: scaled_dot_product_attention(*x, mask, scale=0.7, backend="chunked"), tensors)
    plain = derivatives(lambda *x: scaled_dot_product_attention(*x, mask, scale=0.7, backend="torch"), tensors)
    assert all(t.isfinite().all() for t in ours)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


def test_gradcheck_and_gradgradcheck() -> None:
    mask = hidden(2, 1, 1, M)
    tensors = inputs(2, 2)

    def attend(*x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*x, mask, backend="chunked")

    assert torch.autograd.gradcheck(attend, tensors) and torch.autograd.gradgradcheck(attend, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, None])
def test_half_precision_errs_as_little_as_plain_products(dtype: torch.dtype, kind: torch.dtype | None) -> None:
    mask = hidden(N, M) if kind is torch.bool else torch.randn(N, M).to(kind or dtype)
    tensors = inputs(2, 3, dtype=dtype)
    wide = tuple(x.detach().double().requires_grad_() for x in tensors)
    as_wide = mask if kind is torch.bool else mask.double()
    exact = derivatives(lambda *x: scaled_dot_product_attention(*x, as_wide), wide)
    errors = []
    for form in ("chunked", "torch"):
        found = derivatives(lambda *x, form=form: scaled_dot_product_attention(*x, mask, backend=form), tensors)
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 2 * plain + torch.finfo(dtype).eps


def test_large_calls_with_a_mask_store_nothing_of_their_logits() -> None:
    q, k, v = (torch.randn(1, 1, 512, 8).requires_grad_() for _ in range(3))
    mask = torch.ones(1, 1, 1, 512, dtype=torch.bool)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        scaled_dot_product_attention(q, k, v, mask)
    assert saved and max(saved) < 512 * 512
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        scaled_dot_product_attention(q, k, v, mask, backend="torch")
    assert max(saved) == 512 * 512


def test_a_mask_that_changes_before_the_backward_pass_raises() -> None:
    tensors, mask = inputs(2, 2), torch.zeros(N, M, dtype=torch.float64)
    output = scaled_dot_product_attention(*tensors, mask, backend="chunked")
    mask.add_(1.0)
    with pytest.raises(RuntimeError, match="attn_mask was changed in place"):
        torch.autograd.grad(output.sum(), tensors)


def test_third_order_raises() -> None:
    tensors, mask = inputs(1, 1), torch.ones(N, M, dtype=torch.bool)
    output = scaled_dot_product_attention(*tensors, mask, backend="chunked")
    (first,) = torch.autograd.grad(output.pow(3).sum(), tensors[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.square().sum(), tensors[2])


def test_a_mask_with_a_gradient_runs_in_plain_pytorch() -> None:
    q, k, v = (torch.randn(1, 1, 300, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    bias = torch.randn(300, 300, dtype=torch.float64).requires_grad_()
    output = scaled_dot_product_attention(q, k, v, bias)
    (found,) = torch.autograd.grad(output.square().sum(), bias)
    expected = (((q * 8**-0.5) @ k.mT + bias).softmax(-1) @ v).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, bias)[0])


# Shapes of masks for [2, 3, N, M]; of some queries the first keys are hidden, as on the left of a padded sentence.
SHAPES = {
    "keys": (2, 1, 1, 75),
    "queries": (2, 1, 130, 1),
    "heads": (3, 130, 75),
    "all": (2, 3, 130, 75),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "float", "half", "least"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_plain_products(shape: str, kind: str, dtype: torch.dtype) -> None:
    """To second order, within twice plain PyTorch's error; "least" hides by the least number, as transformers does."""
    torch.manual_seed(0)
    wide = tuple(torch.randn(2, 3, length, 24) for length in (130, 75, 75))
    mask: Tensor = hidden(*SHAPES[shape])
    mask[..., :40] &= SHAPES[shape][-1] == 1 or torch.rand(*SHAPES[shape][:-1], 1) > 0.5
    if kind != "bool":
        least = torch.finfo(torch.float32).min if kind == "least" else -torch.inf
        mask = torch.where(mask, torch.randn(SHAPES[shape]) if kind != "least" else 0.0, least)
        mask = mask.to(dtype) if kind == "half" else mask
    if "cannot run" in backends("scaled_dot_product_attention", *(t.to(dtype) for t in wide))["cpp"]:
        pytest.skip("the C++ kernels cannot run here")

    def run(dtype: torch.dtype, form: str) -> list[Tensor]:
        tensors = tuple(t.to(torch.bfloat16).to(dtype).requires_grad_() for t in wide)
        given = mask if kind in ("bool", "least") or dtype != torch.float64 else mask.double()
        given = given.double().clamp_min(-1e300) if kind == "least" and dtype == torch.float64 else given
        return derivatives(lambda *x: scaled_dot_product_attention(*x, given, scale=0.3, backend=form), tensors)

    exact, plain, ours = run(torch.float64, "torch"), run(dtype, "torch"), run(dtype, "cpp")
    for found, theirs, right in zip(ours, plain, exact, strict=True):
        errors = [((t.double() - right).norm() / right.norm()).item() for t in (found, theirs)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps, errors


def test_a_mask_that_changes_before_the_backward_of_the_kernels_raises() -> None:
    q, k, v = (torch.randn(1, 1, 20, 8).requires_grad_() for _ in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool)
    output = scaled_dot_product_attention(q, k, v, mask, backend="cpp")
    mask[0, 0] = False
    with pytest.raises(RuntimeError, match="attn_mask was changed in place"):
        output.sum().backward()
