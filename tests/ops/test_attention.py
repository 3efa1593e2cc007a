from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import FORMS, KERNELS, derivatives, form, inputs, plain, relative_error, widened
from kernelcases import check_errors, error, random, rounding_effects
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import backends, scaled_dot_product_attention


def assert_as_accurate(attend: Callable[..., Tensor], tensors: tuple[Tensor, ...], is_causal: bool = False) -> None:
    """No result has more than twice the error of torch's in the same dtype, or the error of a few roundings.

    Torch's are the output and first derivatives of its own op, and what plain matrix products give.
    """

    def direct(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, is_causal)

    def reference() -> list[Tensor]:
        return list(derivatives(direct, widened(tensors), dtype).values())

    dtype = tensors[0].dtype
    exact, native = reference(), list(derivatives(direct, tensors).values())
    fused = F.scaled_dot_product_attention(*tensors, is_causal=is_causal)
    fused_gradients = torch.autograd.grad(fused, tensors, random(*fused.shape, seed=10, dtype=dtype))
    for i, x in enumerate((fused, *fused_gradients)):
        native[i] = max(x, native[i], key=lambda result, i=i: error(result, exact[i]))
    found = derivatives(attend, tensors)
    assert all(torch.isfinite(x).all() for x in found.values())
    check_errors(list(found.values()), exact, rounding_effects(reference, exact), dtype, native)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_matches_loops(backend: str, scale: float | None) -> None:
    dtype = torch.float32 if "float64" in backends("scaled_dot_product_attention", *inputs())[backend] else None
    q, k, v = inputs(2, dtype=dtype or torch.float64)
    actual = scaled_dot_product_attention(q, k, v, scale=scale, backend=backend)
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
                assert actual[b, i, j].item() == pytest.approx(expected, rel=1e-5 if dtype else 1e-12)


SIZES = [
    # n, m, d, dv
    (1, 1, 8, 8),
    (1, 129, 8, 16),
    (3, 1, 1, 40),
    (63, 100, 40, 8),
    (100, 63, 59, 59),
    (127, 129, 111, 1),
    (129, 127, 1, 111),
    (1025, 63, 16, 16),
    (3, 1025, 8, 59),
    (100, 100, 256, 200),
]


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_errors_are_at_most_twice_those_of_plain_products(backend: str, causal: bool, sizes: tuple[int, ...]) -> None:
    n, m, d, dv = sizes
    heads = 2 if min(n, m) > 9 else 30
    tensors = inputs(2, heads, n=n, m=m, d=d, dv=dv, dtype=torch.float32)
    assert_as_accurate(form(backend, is_causal=causal), tensors, causal)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(33, 47, 16, 16), (50, 20, 8, 40)], ids=str)
def test_half_precision(backend: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    n, m, d, dv = sizes
    tensors = inputs(2, 2, n=n, m=m, d=d, dv=dv, dtype=dtype)
    if backend == "cpp" and dtype == torch.float16:
        with pytest.raises(ValueError, match=r"float32, bfloat16, not torch.float16; can run this call: chunked"):
            form(backend)(*tensors)
    else:
        assert_as_accurate(form(backend), tensors)


@pytest.mark.parametrize("backend", FORMS)
def test_any_strides(backend: str) -> None:
    """Features not adjacent in memory, lengths and heads exchanged in memory, and dimensions of stride 0."""

    def transposed(x: Tensor) -> Tensor:
        return x.detach().mT.contiguous().mT.requires_grad_()

    def heads_last(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    tensors = inputs(2, 3, n=21, m=17, d=8, dv=8, dtype=torch.float32)
    expected = derivatives(form(backend), tensors)
    for change in (transposed, heads_last):
        changed = tuple(change(x) for x in tensors)
        assert not all(x.is_contiguous() for x in changed)
        for name, x in derivatives(form(backend), changed).items():
            torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    key = tensors[1][:, :1, :1].detach()
    expanded = tensors[0], key.expand(2, 3, 17, 8), tensors[2][:1, :1].expand(2, 3, 17, 8)
    copied = tuple(x.clone().detach().requires_grad_() for x in expanded)
    want = plain(*copied)
    want.sum().backward()
    q = tensors[0].detach().requires_grad_()
    got = scaled_dot_product_attention(q, expanded[1], expanded[2], backend=backend)
    torch.testing.assert_close(got, want)
    (dq,) = torch.autograd.grad(got.sum(), q)  # the cotangent is one number, expanded
    torch.testing.assert_close(dq, copied[0].grad)


@pytest.mark.parametrize("backend", ["torch", "chunked"])
@pytest.mark.parametrize("d, dv", [(2, 2), (3, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_derivatives(backend: str, d: int, dv: int, causal: bool) -> None:
    """d = dv is torch's fused kernel in the chunked form, d != dv its own blocks."""
    attend = form(backend, is_causal=causal)
    args = inputs(2, n=3, m=2, d=d, dv=dv)
    assert gradcheck(attend, args)
    assert gradgradcheck(attend, args)


@pytest.mark.parametrize("backend", FORMS)
def test_absent_cotangents(backend: str) -> None:
    """Each derivative of one first derivative alone; the others' cotangents are absent, not zero."""
    tensors = inputs(2, 2, n=9, m=13, d=6, dv=5, dtype=torch.float32)
    exact = widened(tensors)
    for i in range(3):
        found = []
        for attend, args in ((form(backend), tensors), (plain, exact)):
            o = attend(*args)
            first = torch.autograd.grad(o.square().sum(), args[i], create_graph=True)[0]
            found.append(torch.autograd.grad(first.square().sum(), args, allow_unused=True))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", FORMS)
def test_penalty_with_a_constant_seed_through_two_layers(backend: str) -> None:
    """Weight gradients of a gradient-norm penalty: wrong without an error wherever a second derivative is dropped."""

    def weight_gradients(dtype: torch.dtype, attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        weights = [random(8, 8, seed=i, dtype=dtype).mul_(0.3).requires_grad_() for i in range(6)]
        x = random(2, 20, 8, seed=9, dtype=dtype).requires_grad_()
        y = x
        for layer in (weights[:3], weights[3:]):
            y = y + attend(*(y @ w for w in layer))
        gradient = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)[0]
        return torch.autograd.grad((gradient.flatten(1).norm(dim=1) - 1).square().mean(), weights)

    exact = weight_gradients(torch.float64, plain)
    for mine, theirs in zip(weight_gradients(torch.float32, form(backend)), exact, strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("backend", KERNELS)
def test_third_order_raises(backend: str) -> None:
    q, k, v = inputs(n=4, dtype=torch.float32)

    def second(backend: str) -> Tensor:
        o = scaled_dot_product_attention(q, k, v, backend=backend)
        first = torch.autograd.grad(o.square().sum(), q, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), q, create_graph=True)[0]

    with pytest.raises(NotImplementedError, match=r"third derivative of scaled_dot_product_attention .*'torch' has it"):
        torch.autograd.grad(second(backend).sum(), q)
    assert torch.autograd.grad(second("torch").sum(), q)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_stay_finite(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in inputs(n=20, m=30, d=8, dv=8))
    args = (q * 1e4).requires_grad_(), k.requires_grad_(), v.requires_grad_()
    assert (q.float() @ k.mT.float() * 1e4).abs().max() > 2e4
    for name, x in derivatives(form(backend, scale=1.0), args).items():
        assert torch.isfinite(x).all(), name
    best = (q.double() @ k.double().mT).argmax(dim=1)
    torch.testing.assert_close(scaled_dot_product_attention(*args, scale=1.0, backend=backend), v[best])


def test_long_rows_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of heads, the last one smaller, causal ones with M on both sides of N."""
    from fastgan.ops import attention_chunked

    monkeypatch.setitem(attention_chunked._BLOCK, "cpu", 16 * 40)
    for n, m in ((50, 40), (40, 50), (20, 8)):
        for causal in (False, True):
            args = inputs(1, 3, n=n, m=m, d=4, dv=3)
            mine = derivatives(form("chunked", is_causal=causal), args)
            theirs = derivatives(lambda q, k, v, causal=causal: plain(q, k, v, causal), args)
            for name in mine:
                torch.testing.assert_close(mine[name], theirs[name])


@pytest.mark.parametrize("backend", FORMS)
def test_leading_dimensions_broadcast(backend: str) -> None:
    q, k, v = (random(*s, dtype=torch.float32) for s in ((2, 1, 4, 3), (3, 5, 3), (5, 2)))
    out = scaled_dot_product_attention(q, k, v, backend=backend)
    assert out.shape == (2, 3, 4, 2)
    torch.testing.assert_close(out[1, 2], plain(q[1, 0], k[2], v))
    assert scaled_dot_product_attention(q, k, v.expand(7, 6, 2, 3, 5, 2), backend=backend).shape == (7, 6, 2, 3, 4, 2)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (5, 0, 4, 2), (5, 3, 4, 0), (5, 3, 0, 2)], ids=str)
def test_empty(backend: str, sizes: tuple[int, ...]) -> None:
    n, m, d, dv = sizes
    args = inputs(2, 2, n=n, m=m, d=d, dv=dv, dtype=torch.float32)
    found = derivatives(form(backend), args)
    assert found["o"].shape == (2, 2, n, dv)
    torch.testing.assert_close(found["o"], F.scaled_dot_product_attention(*args))
    assert all(torch.isfinite(x).all() for x in found.values())
    nothing = torch.zeros(0, 2, 3, 4)
    assert scaled_dot_product_attention(nothing, nothing, nothing, backend=backend).shape == (0, 2, 3, 4)


def test_queries_without_keys_are_zero_with_zero_gradients() -> None:
    q, k, v = inputs(2)
    seen = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]).bool()
    as_float = torch.zeros(5, 3, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    rows = seen.any(dim=1)
    for mask in (seen, as_float):
        found = derivatives(lambda q, k, v, mask=mask: scaled_dot_product_attention(q, k, v, mask), (q, k, v))
        assert all(torch.isfinite(x).all() for x in found.values())
        for name in ("o", "dq", "gq", "gdo"):
            assert (found[name][:, ~rows] == 0).all() and (found[name][:, rows] != 0).any(), name
        torch.testing.assert_close(
            found["o"][:, 2], plain(q[:, 2:3], k[:, ::2], v[:, ::2])[:, 0], msg="row 2 sees keys 0 and 2"
        )
    assert gradcheck(lambda q, k, v: scaled_dot_product_attention(q, k, v, seen), (q, k, v))
    assert gradgradcheck(lambda q, k, v: scaled_dot_product_attention(q, k, v, seen), (q, k, v))
    mask = random(5, 3).requires_grad_()
    assert gradgradcheck(scaled_dot_product_attention, (q, k, v, mask))


def test_dropout() -> None:
    q, k, v = inputs(64, n=8, m=8, d=4, dv=4, dtype=torch.float32)
    torch.manual_seed(0)
    out = scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=0.25)
    assert out.std() > 0.05  # rows no longer sum to 1 ...
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)  # ... but on average they do
    assert (scaled_dot_product_attention(q, k, v, dropout_p=1.0) == 0).all()
    torch.autograd.grad(torch.autograd.grad(out.sum(), q, create_graph=True)[0].square().sum(), k)
