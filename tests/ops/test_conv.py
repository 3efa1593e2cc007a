from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelcases import derivatives, random
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops import (
    avg_pool2d,
    conv2d,
    conv2d_downsample,
    conv_products,
    conv_transpose2d,
    interpolate_nearest,
    linear,
    upsample_conv2d,
)
from fastgan.ops.qualification import measurement


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return {
        "n": draw(st.integers(1, 3)),
        "groups": draw(st.sampled_from([1, 1, 2])),
        "i": draw(st.integers(1, 3)),
        "o": draw(st.integers(1, 3)),
        "kernel": draw(pair),
        "size": draw(st.tuples(st.integers(5, 8), st.integers(5, 8))),
        "stride": draw(st.one_of(st.integers(1, 2), pair)),
        "padding": draw(st.one_of(st.integers(0, 1), st.tuples(st.integers(0, 1), st.integers(0, 1)))),
        "dilation": draw(st.one_of(st.just(1), st.just((1, 2)))),
        "bias": draw(st.booleans()),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "sliced", "expanded"])),
    }


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.repeat(1, 1, 1, 2)[..., ::2]
    elif layout == "expanded":
        x = x[:1].expand_as(x)
    return x.detach().requires_grad_()


@given(geometries(), st.booleans())
@settings(max_examples=25)
def test_equals_torch_to_third_order(g: dict[str, Any], transposed: bool) -> None:
    i, o, groups = g["i"] * g["groups"], g["o"] * g["groups"], g["groups"]
    x = laid_out(random(g["n"], i, *g["size"]), g["layout"])
    weight = random(i if transposed else o, (o if transposed else i) // groups, *g["kernel"], seed=1).requires_grad_()
    inputs = [x, weight] + ([random(o, seed=2).requires_grad_()] if g["bias"] else [])
    how = {"stride": g["stride"], "padding": g["padding"], "dilation": g["dilation"], "groups": groups}
    ours, theirs = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    for actual, expected in zip(
        derivatives(lambda *t: ours(*t, **how), inputs, 3),
        derivatives(lambda *t: theirs(*t, **how), inputs, 3),
        strict=True,
    ):
        scale = max(1.0, expected.abs().max().item())  # terms are of size 1 even where they cancel
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(kernel: tuple[int, int], padding: str) -> None:
    x, w = random(2, 3, 6, 7).requires_grad_(), random(4, 3, *kernel, seed=1).requires_grad_()
    torch.testing.assert_close(conv2d(x, w, padding=padding), F.conv2d(x, w, padding=padding))


def test_output_padding_and_unbatched_input() -> None:
    x, w = random(2, 3, 4, 5).requires_grad_(), random(3, 2, 3, 3, seed=1).requires_grad_()
    how: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": (1, 0)}
    torch.testing.assert_close(conv_transpose2d(x, w, **how), F.conv_transpose2d(x, w, **how))
    torch.testing.assert_close(conv_transpose2d(x[0], w, **how), F.conv_transpose2d(x[0], w, **how))
    assert gradgradcheck(lambda *t: conv_transpose2d(*t, **how), (x[:1, :, :2, :2].detach().requires_grad_(), w))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed: bool) -> None:
    inputs = tuple(t.requires_grad_() for t in (random(2, 2, 3, 4), random(2, 2, 2, 3, seed=1), random(2, seed=2)))

    def op(*t: Tensor) -> Tensor:
        return (conv_transpose2d if transposed else conv2d)(*t, stride=2, padding=1)

    assert gradcheck(op, inputs)
    assert gradgradcheck(op, inputs)


def test_only_needed_products_are_computed(products: Callable[[Callable[[], object]], int]) -> None:
    tensors = random(1, 2, 5, 5), random(3, 2, 3, 3, seed=1), random(1, 3, 3, 3, seed=2)
    x, w1, w2 = (t.requires_grad_() for t in tensors)
    score = conv2d(conv2d(x, w1), w2).sum()
    assert products(lambda: torch.autograd.grad(score, x, retain_graph=True)) == 2
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    # Two weight gradients, and the cotangent through the first layer alone.
    assert products(lambda: torch.autograd.grad(gradient.square().sum(), [w1, w2])) == 3
    # The forward and one weight gradient.
    assert products(lambda: torch.autograd.grad(conv2d(x.detach(), w1).sum(), w1)) == 2


def test_a_bias_has_no_gradient_from_a_penalty() -> None:
    x, w, b = (
        random(1, 2, 4, 4).requires_grad_(),
        random(1, 2, 3, 3, seed=1).requires_grad_(),
        random(1).requires_grad_(),
    )
    (gradient,) = torch.autograd.grad(conv2d(x, w, b).sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), [w, b], allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [conv2d, conv_transpose2d])
def test_a_bias_has_the_sum_of_the_cotangent_alone_and_beside_others(
    op: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    tensors = random(2, 3, 5, 6), random(3, 3, 3, 3, seed=1), random(3, seed=2)
    x, w, b = (t.to(dtype).requires_grad_() for t in tensors)
    seed = random(*op(x, w, b).shape, seed=3).to(dtype)
    exact, scale = seed.double().sum((0, 2, 3)), seed.double().abs().sum((0, 2, 3)).norm()
    for wanted in ([b], [b, x], [b, w], [b, x, w]):
        found = torch.autograd.grad(op(x, w, b), wanted, seed)
        assert found[0].dtype == dtype and all(t.isfinite().all() and t.any() for t in found)
        assert (found[0].double() - exact).norm() <= 0.5 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("op", [conv2d, conv_transpose2d])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs(op: Callable[..., Tensor]) -> None:
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, w)
        (gradient,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
    assert y.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    gradient.square().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    reference = w.detach().requires_grad_()
    (full,) = torch.autograd.grad(op(x, reference).sum(), x, create_graph=True)
    full.square().sum().backward()
    assert reference.grad is not None
    assert (w.grad - reference.grad).norm() < 0.02 * reference.grad.norm()


@pytest.mark.parametrize("op", [conv2d, conv_transpose2d])
def test_keeps_channels_last_in_every_order(op: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = op(x, w, padding=1)
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (ggx,) = torch.autograd.grad(gx.square().sum(), x)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, gx, ggx))


@pytest.mark.parametrize(
    "op",
    [upsample_conv2d, conv2d_downsample, conv_transpose2d, lambda x, w: avg_pool2d(x) + interpolate_nearest(x).mean()],
)
def test_compiles_in_one_graph(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = torch.randn(8, 4, 16, 16), torch.randn(4, 4, 3, 3)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    found = []
    for f in (op, compiled):
        t = x.clone().requires_grad_()
        y = f(t, w)
        found.append((y, torch.autograd.grad(y.square().sum(), t)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_compiles_and_transforms() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    expected = torch.autograd.grad(conv2d(x, w.requires_grad_()).square().sum(), w)[0]
    compiled = torch.compile(conv2d, backend="aot_eager", fullgraph=True)
    near = {"rtol": 1e-4, "atol": 1e-4}  # one is our kernel's, the others PyTorch's
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w).square().sum(), w)[0], expected, **near)
    torch.testing.assert_close(torch.func.grad(lambda t: conv2d(x, t).square().sum())(w.detach()), expected, **near)
    each = torch.vmap(lambda t: conv2d(t, w.detach()))(x)
    torch.testing.assert_close(each, conv2d(x, w).detach())


@pytest.mark.parametrize("op", [conv2d, conv_transpose2d])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2)])
def test_forward_mode_and_its_derivative(op: Callable[..., Tensor], moving: tuple[int, ...]) -> None:
    inputs = [random(2, 3, 4, 5).requires_grad_(), random(3, 3, 3, 3, seed=1).requires_grad_(), random(3, seed=2)]
    reference = F.conv2d if op is conv2d else F.conv_transpose2d

    def tangent(f: Callable[..., Tensor]) -> list[Tensor]:
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t, torch.cos(t).detach()) if i in moving else t for i, t in enumerate(inputs)]
            ty = fwAD.unpack_dual(f(*duals, stride=2, padding=1)).tangent
            assert ty is not None
            if not ty.requires_grad:
                return [ty, *map(torch.zeros_like, inputs[:2])]
            gradients = torch.autograd.grad(ty.square().sum(), inputs[:2], allow_unused=True, materialize_grads=True)
            return [ty, *gradients]

    for actual, expected in zip(tangent(op), tangent(reference), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,)])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2)])
def test_linear_in_forward_mode(shape: tuple[int, ...], moving: tuple[int, ...]) -> None:
    inputs = [t.requires_grad_() for t in (random(*shape), random(3, 4, seed=1), random(3, seed=2))]

    def tangent(f: Callable[..., Tensor]) -> list[Tensor]:
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t, torch.cos(t).detach()) if i in moving else t for i, t in enumerate(inputs)]
            y = f(*duals)
            ty = fwAD.unpack_dual(y).tangent
            assert ty is not None
            value = y.square().sum() + ty.square().sum()
            return [y, ty, *torch.autograd.grad(value, inputs)]

    for actual, expected in zip(tangent(linear), tangent(F.linear), strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_samples() -> None:
    x, w = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.ones(2, 3, 3, 3, requires_grad=True)
    y = conv2d(x, w)
    assert y.shape == (0, 2, 2, 2)
    y.sum().backward()
    assert w.grad is not None and w.grad.abs().sum() == 0


def test_linear_needs_four_products_in_a_penalty() -> None:
    """Four matrix products for each layer in a penalty with weight gradients."""

    class Matmuls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return op(*args, **(kwargs or {}))

    x, w1, w2 = (t.requires_grad_() for t in (random(5, 4), random(3, 4, seed=1), random(2, 3, seed=2)))
    with Matmuls() as seen:
        (gradient,) = torch.autograd.grad(linear(linear(x, w1), w2).square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.sum(), [w1, w2])
    curved = seen.count
    with Matmuls() as seen:
        (gradient,) = torch.autograd.grad(linear(linear(x, w1), w2).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), [w1, w2])
    assert seen.count <= 8 < curved


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            {"weight": torch.zeros(4, 2, 3, 3)},
            ValueError,
            r"weight must be \[O, 3, kH, kW\], O divisible by groups, got shape \(4, 2, 3, 3\)",
        ),
        (
            {"weight": torch.zeros(4, 3, 3, 3).double()},
            TypeError,
            "weight must be torch.float32, as input, got torch.float64",
        ),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\], got shape \(3,\)"),
        ({"input": torch.zeros(3, 3)}, ValueError, r"input must be \[N, C, H, W\] or \[C, H, W\], got 2 dimensions"),
        ({"groups": 2}, ValueError, "groups must be a divisor of the 3 channels of input, got 2"),
        ({"padding": "full"}, ValueError, "padding must be numbers, 'valid' or 'same', got 'full'"),
        (
            {"padding": "same", "stride": 2},
            ValueError,
            r"stride must be 1 with padding 'same', got \(2, 2\)",
        ),
        ({"stride": (1, 2, 3)}, ValueError, r"stride must be an integer or a pair of integers, got \(1, 2, 3\)"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, ValueError, "weight must be on cpu, as input, got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be winograd, cpp, lean, torch for conv2d, got 'cuda'"),
    ],
)
def test_conv2d_argument_errors(how: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": torch.zeros(2, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3, requires_grad=True), **how}
    with pytest.raises(error, match=message):
        conv2d(**given)


def test_conv_transpose2d_rejects_a_weight_of_conv2d() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[3, O/groups, kH, kW\], got shape \(4, 3, 3, 3\)"):
        conv_transpose2d(torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3))


def strided(x: Tensor, order: tuple[int, ...], every: int, offset: int) -> Tensor:
    """x with its dimensions in this order in memory, or each element followed by others, or not at the beginning."""
    inverse = [order.index(i) for i in range(4)]
    memory = torch.zeros(offset + x.numel() * every, dtype=x.dtype)[offset::every]
    memory = (
        memory.view([x.shape[i] for i in order])
        if every == 1
        else memory.as_strided(
            [x.shape[i] for i in order],
            [s * every for s in torch.empty([x.shape[i] for i in order]).stride()],
            memory.storage_offset(),
        )
    )
    return memory.permute(inverse).copy_(x)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    return tuple(draw(st.permutations(range(4)))), draw(st.integers(1, 2)), draw(st.integers(0, 1))


@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.lists(layouts(), min_size=6, max_size=6),
    st.booleans(),
    st.fixed_dictionaries({"stride": st.integers(1, 2), "padding": st.integers(0, 1), "dilation": st.integers(1, 2)}),
    st.booleans(),
)
@settings(max_examples=90)
def test_every_stride_of_every_tensor(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    how: list[tuple[tuple[int, ...], int, int]],
    transposed: bool,
    geometry: dict[str, int],
    biased: bool,
) -> None:
    """Of input, weight, and the cotangents of both orders."""
    op, plain = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    w = random(*shape, seed=1).to(dtype)
    w = w.transpose(0, 1) if transposed else w
    groups = 3 if shape[1] == 1 and shape[0] % 3 == 0 and not transposed else 1
    x = random(2, groups * shape[1], 6, 5).to(dtype)
    bias = random(shape[0], seed=9).to(dtype) if biased else None
    results = []
    for f, laid in ((op, True), (plain, False)):
        a, b = (strided(t, *how[i]) if laid else t.clone() for i, t in enumerate((x, w)))
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        y = f(a, b, bias, groups=groups, **geometry)
        seed = random(*y.shape, seed=2).to(dtype)
        seed = (strided(seed, *how[2]) if laid else seed).detach().requires_grad_()
        first = torch.autograd.grad(y, (a, b), seed, create_graph=True)
        ups = [random(*t.shape, seed=3 + i).to(dtype) for i, t in enumerate(first)]
        ups = [strided(u, *how[3 + i]) if laid else u for i, u in enumerate(ups)]
        results.append([y, *first, *torch.autograd.grad(first, (a, b, seed), ups)])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.1)
    for found, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_group", [(2, 2), (4, 4), (4, 3), (1, 4)])
def test_groups_of_few_channels(per_group: tuple[int, int], transposed: bool) -> None:
    """Their weight's gradient is computed in channels_last, and comes back in the weight's own strides."""
    f, plain = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    groups, (i, o) = 5, per_group
    tensors = random(3, groups * i, 7, 6), random(*((groups * i, o) if transposed else (groups * o, i)), 3, 3, seed=1)

    def second(f: Any, dtype: torch.dtype) -> list[Tensor]:
        x, w = (t.to(dtype).requires_grad_() for t in tensors)
        y = f(x, w, stride=2, padding=1, groups=groups)
        gradients = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return [*gradients, *torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, w))]

    found, exact = second(f, torch.float32), second(plain, torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-2, check_dtype=False)
    assert all(g.is_contiguous() for g in found[1::2])


@pytest.mark.parametrize("op", [conv2d, conv_transpose2d])
def test_float16_on_a_cpu_is_multiplied_in_float32(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has no products of float16, as PyTorch's kernels then take many times as long."""
    monkeypatch.setattr(conv_products, "_multiplies_float16", lambda: False)
    products: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "convolution" in str(f):
                products.update(t.dtype for t in args if isinstance(t, Tensor))
            return f(*args, **(kwargs or {}))

    x, w = random(2, 4, 6, 5).half(), random(4, 4, 3, 3, seed=1).half()
    with Products():
        plain, found = op(x, w, backend="lean"), measurement.derivatives(op, [x, w])
        with torch.autocast("cpu", dtype=torch.float16):
            assert op(x.float(), w.float(), backend="lean").dtype == torch.float16
    assert products == {torch.float32} and {t.dtype for t in (plain, *found) if t is not None} == {torch.float16}
    assert torch.equal(plain, op(x.float(), w.float()).half())
    for half, exact in zip(found, measurement.derivatives(op, [x.double(), w.double()]), strict=True):
        assert half is not None and exact is not None
        torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-2 * float(exact.detach().abs().max()))
    huge = torch.full_like(x, 6e4)
    assert not op(huge, torch.ones_like(w), backend="lean").isfinite().any()  # too large a result is infinite
