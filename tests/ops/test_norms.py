"""Layer, group and instance norm against torch's, to second order, in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgan import ops
from fastgan.ops import norms

NO_CPP = norms._no_cpp()
FORMS = ["fused", pytest.param("cpp", marks=pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP)))]

# Name -> (shape, function of (x, weight, bias, form) with its torch counterpart, shape of weight and bias).
CASES: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "layer": (
        (3, 4, 5),
        lambda x, w, b, form: ops.layer_norm(x, (5,), w, b, 1e-3, backend=form),
        lambda x, w, b: F.layer_norm(x, (5,), w, b, 1e-3),
        (5,),
    ),
    "layer, 2 dimensions": (
        (3, 4, 5),
        lambda x, w, b, form: ops.layer_norm(x, (4, 5), w, b, backend=form),
        lambda x, w, b: F.layer_norm(x, (4, 5), w, b),
        (4, 5),
    ),
    "layer, all": (
        (4, 5),
        lambda x, w, b, form: ops.layer_norm(x, (4, 5), w, b, backend=form),
        lambda x, w, b: F.layer_norm(x, (4, 5), w, b),
        (4, 5),
    ),
    "group": (
        (2, 6, 3, 2),
        lambda x, w, b, form: ops.group_norm(x, 3, w, b, 1e-3, backend=form),
        lambda x, w, b: F.group_norm(x, 3, w, b, 1e-3),
        (6,),
    ),
    "group, no pixels": (
        (5, 6),
        lambda x, w, b, form: ops.group_norm(x, 2, w, b, backend=form),
        lambda x, w, b: F.group_norm(x, 2, w, b),
        (6,),
    ),
    "instance": (
        (2, 3, 4, 3),
        lambda x, w, b, form: ops.instance_norm(x, weight=w, bias=b, eps=1e-3, backend=form),
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=1e-3),
        (3,),
    ),
    "instance, 1 dimension": (
        (2, 3, 7),
        lambda x, w, b, form: ops.instance_norm(x, weight=w, bias=b, backend=form),
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        (3,),
    ),
}


def tensors(shape: tuple[int, ...], of: tuple[int, ...], affine: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    """x, and `affine` of weight and bias."""
    x = (torch.randn(shape) * 2 + 1).to(dtype).requires_grad_()
    parameters = [torch.randn(of).to(dtype).requires_grad_() if i < affine else None for i in range(2)]
    return [x, *parameters]


def derivatives(function: Callable[..., Tensor], arguments: list[Any]) -> list[Tensor]:
    """The result, all first gradients, and all gradients of a function of those."""
    inputs = [t for t in arguments if t is not None]
    output = function(*arguments)
    first = torch.autograd.grad(output.pow(3).sum(), inputs, create_graph=True)
    last = sum((g * g.detach().cos()).sum() for g in first)
    return [output, *first, *torch.autograd.grad(last, inputs)]


@pytest.mark.parametrize("form", ["fused"])
@pytest.mark.parametrize("affine", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_torch_in_float64(name: str, affine: int, form: str) -> None:
    shape, ours, plain, of = CASES[name]
    arguments = tensors(shape, of, affine)
    found = derivatives(lambda *x: ours(*x, form), arguments)
    torch.testing.assert_close(found, derivatives(plain, arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["layer", "group", "instance"])
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    shape, ours, _, of = CASES[name]
    arguments = tensors(shape, of, 2)
    assert torch.autograd.gradcheck(lambda *x: ours(*x, "fused"), arguments)
    assert torch.autograd.gradgradcheck(lambda *x: ours(*x, "fused"), arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_those_of_torch(name: str, affine: int, dtype: torch.dtype, form: str) -> None:
    shape, ours, plain, of = CASES[name]
    arguments = tensors(shape, of, affine, dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in arguments]
    found = derivatives(lambda *x: ours(*x, form), arguments)
    other, right = derivatives(plain, arguments), derivatives(plain, exact)
    for a, b, c in zip(found, other, right, strict=True):
        error, limit = ((t.double() - c).norm() / c.norm().clamp_min(1e-6) for t in (a, b))
        assert error <= 2 * limit + 4 * torch.finfo(dtype).eps


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (2, 1024), (5, 1025), (70, 3000)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_kernel_of_rows(rows: int, size: int, offset: float) -> None:
    u, g, x = (torch.randn(rows, size) for _ in range(3))
    x = x + offset
    found = norms._cpp(u, g, x, 1e-5)
    exact = norms.fused(*(t.double() for t in (u, g, x)), 1e-5)
    plain = norms.fused(u, g, x, 1e-5)
    for a, b, c in zip(found, plain, exact, strict=True):
        scale = c.norm().clamp_min(1e-3)
        assert (a.double() - c).norm() / scale <= 2 * (b.double() - c).norm() / scale + 1e-5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = norms._cpp(u, g, x, 1e-5)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_the_compiled_op_passes_opcheck() -> None:
    arguments = (*(torch.randn(3, 7) for _ in range(3)), 1e-5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastgan.normalize_second_backward.default, arguments, test_utils=tests)


def test_third_order_raises_and_torch_has_it() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for form in ("fused", "torch"):
        (first,) = torch.autograd.grad(ops.layer_norm(x, (4,), backend=form).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        if form == "torch":
            assert torch.autograd.grad(second.square().sum(), x)[0].isfinite().all()
        else:
            with pytest.raises(NotImplementedError, match="third derivative of a norm"):
                torch.autograd.grad(second.square().sum(), x)


def test_the_result_may_be_changed_in_place() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    for form in ("fused", "torch"):
        y = ops.group_norm(x * 1.0, 2, backend=form).mul_(2)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x)
        assert gradient.abs().sum() > 0


def test_the_default_is_lean_where_it_is_large() -> None:
    large, small = torch.zeros(2, 8, 128, 128), torch.zeros(2, 8, 4, 4)
    for name in ("layer_norm", "group_norm", "instance_norm"):
        assert next(iter(ops.backends(name, large))) == ("cpp" if NO_CPP is None else "fused")
        assert next(iter(ops.backends(name, small))) == "torch"
        assert next(iter(ops.backends(name, large.to(memory_format=torch.channels_last)))) == "torch"
    y = ops.instance_norm(large.clone().requires_grad_())
    assert type(y.grad_fn).__name__ == "_NormBackward"
    assert type(ops.instance_norm(large.clone()).grad_fn).__name__ == "NoneType"


@pytest.mark.parametrize(
    "call",
    [
        lambda norm, x: norm.layer_norm(x, (5,)),
        lambda norm, x: norm.layer_norm(x, (4,), torch.ones(3, dtype=x.dtype)),
        lambda norm, x: norm.group_norm(x, 3),
        lambda norm, x: norm.instance_norm(x[..., :1]),
        lambda norm, x: norm.instance_norm(x, torch.zeros(2), None, use_input_stats=False),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(call: Callable[..., Tensor]) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
        call(F, x)
    with pytest.raises(type(theirs.value)) as ours:
        call(ops, x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda norm, x: norm.layer_norm(x, (4,), None, torch.arange(4.0, dtype=x.dtype)),
        lambda norm, x: norm.instance_norm(x, torch.zeros(2).double(), torch.ones(2).double(), use_input_stats=False),
        lambda norm, x: norm.group_norm(x.float(), 2, torch.ones(2), torch.zeros(2)),
        lambda norm, x: norm.layer_norm(x.transpose(0, 2), (3,)),
        lambda norm, x: norm.group_norm(x.to(torch.complex128).real, 1),
    ],
)
def test_other_calls_are_torchs(call: Callable[..., Tensor]) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(call(ops, x), call(F, x))


def test_autocast_chooses_torchs_dtype() -> None:
    x = torch.randn(2, 8, 128, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.group_norm(x.bfloat16(), 2).dtype == F.group_norm(x.bfloat16(), 2).dtype


@pytest.mark.parametrize("name", ["layer", "group"])  # torch computes instance norm as a batch norm
def test_first_order_has_the_bits_of_torch(name: str) -> None:
    shape, ours, plain, of = CASES[name]
    arguments = tensors(shape, of, 2, torch.float32)
    found, expected = (
        (f(*arguments), torch.autograd.grad(f(*arguments).pow(3).sum(), arguments))
        for f in (lambda *x: ours(*x, "fused"), plain)
    )
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("name", ["layer", "group", "instance"])
def test_transforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, as in a model of a user: torch.func, vmap, forward mode, checkpoints."""
    monkeypatch.setattr(norms, "SMALL_NUMEL", 0)
    shape, ours, plain, of = CASES[name]
    x, *parameters = tensors(shape, of, 2)

    def lean(x: Tensor) -> Tensor:
        return ours(x, *parameters, None)

    def other(x: Tensor) -> Tensor:
        return plain(x, *parameters)

    x = x.detach()
    found, expected = (torch.func.hessian(lambda x, f=f: f(x).pow(3).sum())(x) for f in (lean, other))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.vmap(lean)(x[None]), torch.vmap(other)(x[None]))
    torch.testing.assert_close(torch.func.jvp(lean, (x,), (x,)), torch.func.jvp(other, (x,), (x,)))
    leaf = x.requires_grad_()
    found, expected = (derivatives(f, [leaf]) for f in (lambda x: checkpoint(lean, x, use_reentrant=False), other))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
