"""Attention in torch: a drop-in for its function, transforms, compilers, the compiled ops, argument errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import FORMS, NO_CPP, derivatives, form, inputs, plain, relative_error, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelcases import random
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan.ops import attention as module
from fastgan.ops import backends, scaled_dot_product_attention, use_backend
from fastgan.ops.dispatch import kernel_registry


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
    kernels = ["chunked", *([] if NO_CPP or mask is not None else ["cpp"])]
    for backend in (None, "torch", *kernels):
        ours = scaled_dot_product_attention(q, k, v, **kwargs, backend=backend)
        for a, b in zip((ours, *torch.autograd.grad(ours, (q, k, v), seed)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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


def test_default_follows_the_crossover() -> None:
    small, large = inputs(1, 1, n=20, m=20), inputs(1, 1, n=1024, m=256)
    assert next(iter(backends("scaled_dot_product_attention", *small))) == "torch"
    assert next(iter(backends("scaled_dot_product_attention", *large))) == "chunked"
    assert "faster below" in backends("scaled_dot_product_attention", *small)["chunked"]
    q, k, v = (x.float() for x in large)
    if NO_CPP is None:
        assert next(iter(backends("scaled_dot_product_attention", q, k, v))) == "cpp"
    with use_backend("chunked"), pytest.raises(ValueError, match=r"backend 'chunked': attn_mask with a gradient, and"):
        scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"backend 'chunked': attn_mask with a gradient, and dropout"):
        scaled_dot_product_attention(q, k, v, torch.ones(1024, 256).requires_grad_(), backend="chunked")
    if NO_CPP is None:
        with pytest.raises(ValueError, match=r"backend 'cpp': attn_mask with a gradient, and dropout"):
            scaled_dot_product_attention(q, k, v, torch.ones(1024, 256).requires_grad_(), backend="cpp")


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


@pytest.mark.skipif(NO_CPP is not None, reason=f"no C++ kernels: {NO_CPP}")
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


@pytest.mark.skipif(NO_CPP is not None, reason=f"no C++ kernels: {NO_CPP}")
@pytest.mark.parametrize("sizes", [(1, 1, 200, 70, 8, 16), (3, 4, 100, 130, 16, 8)], ids=str)
def test_results_do_not_depend_on_threads(sizes: tuple[int, ...]) -> None:
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


@pytest.mark.skipif(NO_CPP is not None, reason=f"no C++ kernels: {NO_CPP}")
def test_compiled_ops_check_shapes() -> None:
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


@pytest.mark.skipif(NO_CPP is not None, reason=f"no C++ kernels: {NO_CPP}")
def test_compiled_ops_write_all_of_their_outputs() -> None:
    """Memory that was NaN before leaves no trace: allocations are recycled, so outputs and scratch start as NaN."""
    tensors = inputs(1, 2, n=50, m=37, d=9, dv=17, dtype=torch.float32)
    expected = derivatives(form("cpp"), tensors)
    for _ in range(3):
        poison = [torch.full((size,), torch.nan) for size in range(64, 40000, 1000) for _ in range(4)]
        del poison
        for name, x in derivatives(form("cpp"), tensors).items():
            assert torch.equal(x, expected[name]), name


def test_argument_errors() -> None:
    q, k, v = inputs(2, 4)
    attend = scaled_dot_product_attention
    for exception, text, call in [
        (ValueError, "key must have 4 features, as query, got 3", lambda: attend(q, k[..., :3], v)),
        (ValueError, "value must have length 3, as key, got 2", lambda: attend(q, k, v[..., :2, :])),
        (TypeError, "is_causal must be True or False, got 1", lambda: attend(q, k, v, is_causal=1)),
        (TypeError, "enable_gqa must be True or False, got None", lambda: attend(q, k, v, enable_gqa=None)),
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
def test_triton_needs_compute_capability_8(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    found = kernel_registry.no_products_reason.__wrapped__(0)
    assert (reason in found) if reason else found is None
