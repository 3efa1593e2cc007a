from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelcases import check_errors, error, random, rms, rounding_effects
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan.ops import attention as module
from fastgan.ops import backends, scaled_dot_product_attention, use_backend
from fastgan.ops.attention import OP

_NO_CPP = OP.implementations["cpp"].unsupported_reason()
CPP = pytest.param("cpp", marks=pytest.mark.skipif(_NO_CPP is not None, reason=f"no C++ kernels: {_NO_CPP}"))
KERNELS = ["chunked", CPP]
FORMS = ["torch", *KERNELS]


def inputs(
    *leading: int, n: int = 5, m: int = 3, d: int = 4, dv: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    shapes = (n, d), (m, d), (m, dv)
    return tuple(random(*leading, *shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes))


def plain(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """Matrix products and softmax in the dtype of the inputs: the oracle in float64."""
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return torch.softmax(logits, -1) @ value


def derivatives(
    attend: Callable[..., Tensor], tensors: tuple[Tensor, ...], drawn: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output, first and second derivatives for cotangents drawn from fixed seeds, rounded to the dtype `drawn`."""
    dtype = tensors[0].dtype
    q, k, v = tensors
    o = attend(q, k, v)
    do = random(*o.shape, seed=10, dtype=drawn or dtype).to(dtype).requires_grad_()
    first = torch.autograd.grad(o, (q, k, v), do, create_graph=True)
    us = tuple(random(*x.shape, seed=20 + i, dtype=drawn or dtype).to(dtype) for i, x in enumerate(first))
    second = torch.autograd.grad(first, (q, k, v, do), us)
    names = ("o", "dq", "dk", "dv", "gq", "gk", "gv", "gdo")
    return dict(zip(names, (o, *first, *second), strict=True))


def widened(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() for x in tensors)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of `exact`, which is not small."""
    assert exact.square().mean() > 1e-6
    return error(x, exact) / rms(exact)


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


def form(backend: str | None, **rest: object) -> Callable[..., Tensor]:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, backend=backend, **rest)  # type: ignore[arg-type]


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
    """Features apart in memory, lengths reversed in order with heads, and dimensions of stride 0."""

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
    """Weight gradients of a gradient-norm penalty: wrong in silence wherever a second derivative is dropped."""

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


@settings(max_examples=60)
@given(data=st.data())
def test_is_a_drop_in_for_torch(data: st.DataObject) -> None:
    """Outputs and gradients equal torch's over its arguments, whatever form the default picks."""
    draw = data.draw
    leading = draw(st.sampled_from([(), (2,), (2, 4), (2, 1, 4)]))
    gqa = draw(st.booleans()) if len(leading) >= 2 else False
    n, m, d, dv = (draw(st.integers(1, 9)) for _ in range(4))
    q = random(*leading, n, d, seed=1, dtype=torch.float32).requires_grad_()
    kv_leading = (*leading[:-1], draw(st.sampled_from([1, 2, 4]))) if gqa else leading
    k = random(*kv_leading, m, d, seed=2, dtype=torch.float32).requires_grad_()
    v = random(*kv_leading, m, dv, seed=3, dtype=torch.float32).requires_grad_()
    mask, causal = None, False
    match draw(st.sampled_from(["none", "causal", "bool", "float", "row"])):
        case "causal":
            causal = True
        case "bool":
            mask = random(*leading, n, m, seed=draw(st.integers(0, 9))) > draw(st.sampled_from([-0.5, 0.5]))
        case "float":
            mask = random(n, m, seed=4, dtype=torch.float32)
        case "row":
            mask = random(1, m, seed=5) > 0
    scale = draw(st.sampled_from([None, 0.7]))
    kwargs = {"attn_mask": mask, "is_causal": causal, "scale": scale, "enable_gqa": gqa}
    theirs = F.scaled_dot_product_attention(q, k, v, **kwargs)
    seed = random(*theirs.shape, seed=6, dtype=torch.float32)
    expected = (theirs, *torch.autograd.grad(theirs, (q, k, v), seed))
    kernels = ["chunked", *([] if _NO_CPP else ["cpp"])] if mask is None else []
    for backend in (None, "torch", *kernels):
        ours = scaled_dot_product_attention(q, k, v, **kwargs, backend=backend)
        for a, b in zip((ours, *torch.autograd.grad(ours, (q, k, v), seed)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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


def test_rows_that_see_nothing_are_zero_with_zero_gradients() -> None:
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


@pytest.mark.parametrize("backend", FORMS)
def test_autocast(backend: str) -> None:
    """Computes in autocast's dtype, whatever the inputs have, float64 excepted; gradients in that of the inputs."""
    q, k, v = inputs(2, 2, n=12, m=9, d=8, dv=8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q, k, v.bfloat16(), backend=backend)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        first = torch.autograd.grad(out.float().sum(), (q, k), create_graph=True)
        (second,) = torch.autograd.grad(sum(x.square().sum() for x in first), q)
        wide = scaled_dot_product_attention(*widened((q, k, v)))
    assert wide.dtype == torch.float64
    assert first[0].dtype == second.dtype == torch.float32
    exact = widened((q, k, v))
    expected = torch.autograd.grad(plain(*exact).sum(), exact[:2], create_graph=True)
    assert relative_error(out, plain(*exact)) < 0.02 and relative_error(first[0], expected[0]) < 0.05
    (expected_second,) = torch.autograd.grad(sum(x.square().sum() for x in expected), exact[0])
    assert relative_error(second, expected_second) < 0.1


def test_the_default_follows_the_crossover_and_says_so() -> None:
    small, large = inputs(1, 1, n=20, m=20), inputs(1, 1, n=1024, m=256)
    assert next(iter(backends("scaled_dot_product_attention", *small))) == "torch"
    assert next(iter(backends("scaled_dot_product_attention", *large))) == "chunked"
    assert "faster below" in backends("scaled_dot_product_attention", *small)["chunked"]
    q, k, v = (x.float() for x in large)
    if _NO_CPP is None:
        assert next(iter(backends("scaled_dot_product_attention", q, k, v))) == "cpp"
    with use_backend("chunked"), pytest.raises(ValueError, match=r"backend 'chunked': attn_mask and dropout"):
        scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"backend 'chunked': attn_mask and dropout"):
        scaled_dot_product_attention(q, k, v, torch.ones(1024, 256).bool(), backend="chunked")


def test_torch_func() -> None:
    q, k, v = inputs(2, 2)
    gradient = torch.func.grad(lambda q: scaled_dot_product_attention(q, k, v).square().sum())(q)
    (expected,) = torch.autograd.grad(plain(q, k, v).square().sum(), q)
    torch.testing.assert_close(gradient, expected)
    mapped = torch.vmap(scaled_dot_product_attention)(q, k, v)
    torch.testing.assert_close(mapped, plain(q, k, v))
    hessian = torch.func.hessian(lambda q: scaled_dot_product_attention(q, k[0, 0], v[0, 0]).sum())(q[0, 0])
    assert hessian.abs().sum() > 0


def test_compile_of_first_order_use() -> None:
    q, k, v = inputs(2, 2, n=40, m=30, d=8, dv=8, dtype=torch.float32)
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    for args in ({}, {"is_causal": True}, {"attn_mask": random(40, 30) > 0}):
        ours, theirs = compiled(q, k, v, **args), F.scaled_dot_product_attention(q, k, v, **args)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_export_decomposes_to_aten() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    args = tuple(x.detach() for x in inputs(2, 2, n=40, m=30, d=8, dv=8, dtype=torch.float32))
    program = torch.export.export(Attend(), args)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("aten.softmax") for name in called)
    assert all(name.startswith("aten.") for name in called if not name.startswith("<")), called
    torch.testing.assert_close(program.module()(*args), plain(*args, is_causal=True))


@pytest.mark.skipif(_NO_CPP is not None, reason=f"no C++ kernels: {_NO_CPP}")
def test_the_compiled_ops_pass_opcheck_and_compile() -> None:
    q, k, v = (x.detach() for x in inputs(2, 3, n=20, m=17, d=8, dv=5, dtype=torch.float32))
    kernels = module._kernels("cpp")
    o, lse = kernels.attention_forward(q, k, v, 0.5, True)
    do = torch.randn_like(o)
    for op, args in {
        kernels.attention_forward: (q, k, v),
        kernels.attention_backward: (do, q, k, v, o, lse),
        kernels.attention_second_backward: (None, k, None, do, q, k, v, o, lse),
    }.items():
        torch.library.opcheck(op, (*args, 0.5, True))
    compiled = torch.compile(form("cpp"), backend="aot_eager")
    args = inputs(2, 3, n=20, m=17, d=8, dv=5, dtype=torch.float32)
    out, expected = compiled(*args), plain(*args)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), args), torch.autograd.grad(expected.sum(), args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(_NO_CPP is not None, reason=f"no C++ kernels: {_NO_CPP}")
@pytest.mark.parametrize("sizes", [(1, 1, 200, 70, 8, 16), (3, 4, 100, 130, 16, 8)], ids=str)
def test_threads_change_nothing(sizes: tuple[int, ...]) -> None:
    """Bit for bit, with heads cut into slices and without; two runs agree too."""
    *leading, n, m, d, dv = sizes
    tensors = inputs(*leading, n=n, m=m, d=d, dv=dv, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(derivatives(form("cpp"), tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], x) for name, x in found[0].items())


@pytest.mark.skipif(_NO_CPP is not None, reason=f"no C++ kernels: {_NO_CPP}")
def test_compiled_ops_look_at_what_they_are_given() -> None:
    """Every tensor with one row or number too few, which would be read beyond its end."""
    q, k, v = (x.detach() for x in inputs(1, 1, n=4, m=3, dtype=torch.float32))
    o, lse = torch.ops.fastgan.attention_forward(q, k, v, 1.0, False)
    second = {"uq": q, "uk": k, "uv": v, "do": o, "query": q, "key": k, "value": v, "o": o, "lse": lse}
    torch.ops.fastgan.attention_second_backward(*second.values(), 1.0, False)
    for call, right in (("second_backward", second), ("backward", {n: second[n] for n in list(second)[3:]})):
        for name in right:
            wrong = {**right, name: right[name][:, :, 1:]}
            with pytest.raises(RuntimeError, match=r"\b(uq|uk|uv|do|o|lse|query, key and value) must"):
                getattr(torch.ops.fastgan, f"attention_{call}")(*wrong.values(), 1.0, False)
        both = {**right, "do": right["do"][:, :, 1:], "o": right["o"][:, :, 1:]}
        with pytest.raises(RuntimeError, match=r"o must be \[B, H, N, dv\]"):
            getattr(torch.ops.fastgan, f"attention_{call}")(*both.values(), 1.0, False)


@pytest.mark.skipif(_NO_CPP is not None, reason=f"no C++ kernels: {_NO_CPP}")
def test_compiled_ops_write_all_of_their_outputs() -> None:
    """Memory that was NaN before leaves no trace: allocations are recycled, so outputs and scratch start as NaN."""
    tensors = inputs(1, 2, n=50, m=37, d=9, dv=17, dtype=torch.float32)
    expected = derivatives(form("cpp"), tensors)
    for _ in range(3):
        poison = [torch.full((size,), torch.nan) for size in range(64, 40000, 1000) for _ in range(4)]
        del poison
        for name, x in derivatives(form("cpp"), tensors).items():
            assert torch.equal(x, expected[name]), name


def test_refusals() -> None:
    q, k, v = inputs(2, 4)
    attend = scaled_dot_product_attention
    for exception, text, call in [
        (ValueError, "key must have 4 features, as query, got 3", lambda: attend(q, k[..., :3], v)),
        (ValueError, "value must have length 3, as key, got 2", lambda: attend(q, k, v[..., :2, :])),
        (
            TypeError,
            "query must be float16, bfloat16, float32 or float64, got torch.int64",
            lambda: attend(q.long(), k, v),
        ),
        (TypeError, "value must be torch.float64, as query, got torch.float32", lambda: attend(q, k, v.float())),
        (ValueError, "key must be on cpu, as query, got meta", lambda: attend(q, k.to("meta"), v)),
        (ValueError, r"key must be \[..., length, features\], got 1 dimensions", lambda: attend(q, k[0, 0, 0], v)),
        (
            ValueError,
            r"value must have leading dimensions that broadcast to \(2, 4\), got \(3,\)",
            lambda: attend(q, k, random(3, 3, 2)),
        ),
        (
            ValueError,
            "key must have heads that divide the 4 of query, got 3",
            lambda: attend(q, k[:, :3], v[:, :3], enable_gqa=True),
        ),
        (
            ValueError,
            r"key must be \[..., H, length, features\], got 2 dimensions",
            lambda: attend(q, k[0, 0], v, enable_gqa=True),
        ),
        (ValueError, "dropout_p must be 0 to 1, got 1.5", lambda: attend(q, k, v, dropout_p=1.5)),
        (
            TypeError,
            "attn_mask must be bool, float32 or torch.float64, got torch.int64",
            lambda: attend(q, k, v, torch.ones(5, 3).long()),
        ),
        (
            ValueError,
            r"attn_mask must broadcast to \(2, 4, 5, 3\), got shape \(5, 4\)",
            lambda: attend(q, k, v, torch.ones(5, 4)),
        ),
        (
            ValueError,
            r"attn_mask must broadcast to .*, got shape \(7, 1, 1, 1, 1\)",
            lambda: attend(q, k, v, torch.ones(7, 1, 1, 1, 1)),
        ),
        (
            ValueError,
            "is_causal must be False with attn_mask, got True",
            lambda: attend(q, k, v, torch.ones(5, 3), is_causal=True),
        ),
        (
            ValueError,
            "backend must be triton, cuda, cpp, chunked, torch for scaled_dot_product_attention, got 'cudnn'",
            lambda: attend(q, k, v, backend="cudnn"),
        ),
    ]:
        with pytest.raises(exception, match=f"^{text}"):
            call()


def test_math_backend_of_torch_agrees_to_second_order() -> None:
    def math_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    args = inputs(2, 3, n=17, m=31, d=8, dv=5)
    theirs = derivatives(math_form, args)
    for backend in ("torch", "chunked"):
        for name, x in derivatives(form(backend), args).items():
            torch.testing.assert_close(x, theirs[name])


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "7.5"), ((8, 0), None), ((12, 0), None)])
def test_gpus_too_old_for_the_triton_kernels(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    found = module._unsupported_gpu.__wrapped__(0)
    assert (reason in found) if reason else found is None
