from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelcases import derivatives
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops import (
    avg_pool2d,
    backends,
    conv,
    conv2d,
    conv2d_downsample,
    conv_transpose2d,
    interpolate_nearest,
    linear,
    upsample_conv2d,
)


@pytest.fixture(params=["fused", "steps", "small"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The forms of the scaled convolutions, at sizes where only the last is ever the default."""
    monkeypatch.setattr(conv, "_form", lambda *_: request.param)
    conv._small_sizes.cache_clear()
    yield request.param
    conv._small_sizes.cache_clear()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pixel(x: torch.Tensor, n: int, i: int, y: int, z: int) -> float:
    inside = 0 <= y < x.shape[2] and 0 <= z < x.shape[3]
    return x[n, i, y, z].item() if inside else 0.0


def direct_conv(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """3x3 convolution of same size with zero padding, pixel by pixel."""
    n, i, h, v = x.shape
    out = torch.empty(n, w.shape[0], h, v, dtype=torch.float64)
    for s in range(n):
        for o in range(w.shape[0]):
            for y in range(h):
                for z in range(v):
                    out[s, o, y, z] = bias[o].item() + sum(
                        w[o, c, dy, dz].item() * pixel(x, s, c, y + dy - 1, z + dz - 1)
                        for c in range(i)
                        for dy in range(3)
                        for dz in range(3)
                    )
    return out


def test_upsample_conv2d_matches_loops(form: str) -> None:
    x, w, b = random(1, 2, 2, 3), random(2, 2, 3, 3, seed=1), random(2, seed=2)
    large = torch.empty(1, 2, 4, 6, dtype=torch.float64)
    for y in range(4):
        for z in range(6):
            large[:, :, y, z] = x[:, :, y // 2, z // 2]
    torch.testing.assert_close(interpolate_nearest(x), large, rtol=0, atol=0)
    torch.testing.assert_close(upsample_conv2d(x, w, b), direct_conv(large, w, b))


def test_conv2d_downsample_matches_loops(form: str) -> None:
    x, w, b = random(1, 2, 4, 6), random(2, 2, 3, 3, seed=1), random(2, seed=2)
    full = direct_conv(x, w, b)
    small = torch.empty(1, 2, 2, 3, dtype=torch.float64)
    for y in range(2):
        for z in range(3):
            small[:, :, y, z] = full[:, :, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].sum(dim=(2, 3)) / 4
    torch.testing.assert_close(avg_pool2d(full), small)
    torch.testing.assert_close(conv2d_downsample(x, w, b), small)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "i", "o", "h", "w"), [(2, 3, 5, 8, 6), (1, 1, 1, 2, 2), (3, 4, 2, 16, 16)])
def test_fused_forms_equal_the_two_steps(n: int, i: int, o: int, h: int, w: int, bias: bool, form: str) -> None:
    x, weight = random(n, i, h, w), random(o, i, 3, 3, seed=1)
    b = random(o, seed=2) if bias else None
    up = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, b, padding=1)
    torch.testing.assert_close(upsample_conv2d(x, weight, b), up)
    down = F.avg_pool2d(F.conv2d(x, weight, b, padding=1), 2)
    torch.testing.assert_close(conv2d_downsample(x, weight, b), down)


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_derivatives(op: Callable[..., torch.Tensor], form: str) -> None:
    inputs = tuple(t.requires_grad_() for t in (random(1, 2, 4, 2), random(2, 2, 3, 3, seed=1), random(2, seed=2)))
    assert gradcheck(op, inputs)
    assert gradgradcheck(op, inputs)


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_refusals(op: Callable[..., torch.Tensor]) -> None:
    x, w = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 3, 3)
    with pytest.raises(ValueError, match=r"x must be \[N, I, H, W\], got 3 dimensions"):
        op(x[0], w)
    for wrong in (torch.zeros(5, 4, 3, 3), torch.zeros(5, 3, 1, 1), torch.zeros(5, 3, 3)):
        with pytest.raises(ValueError, match=r"w must be \[O, 3, 3, 3\], got shape \(5, .*\)"):
            op(x, wrong)


@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_conv2d_downsample_refuses_odd_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"x: had size \(\d, \d\); height and width may be even"):
        conv2d_downsample(torch.zeros(1, 2, *size), torch.zeros(2, 2, 3, 3))


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
@settings(max_examples=25, deadline=None, derandomize=True)
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
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


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


def test_only_what_is_asked_is_computed(products: Callable[[Callable[[], object]], int]) -> None:
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
    exact = seed.double().sum((0, 2, 3))
    for wanted in ([b], [b, x], [b, w], [b, x, w]):
        found = torch.autograd.grad(op(x, w, b), wanted, seed)
        assert found[0].dtype == dtype and all(t.isfinite().all() and t.any() for t in found)
        assert (found[0].double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


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


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_the_kernel_with_the_box_is_in_channels_last_too(
    op: Callable[..., Tensor], weights: torch.memory_format, form: str
) -> None:
    x = random(2, 3, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    w = random(5, 3, 3, 3, seed=1).to(memory_format=weights).requires_grad_()
    kernels = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.convolution.default:
                kernels.append(args[1])
            return function(*args, **(kwargs or {}))

    with Seen():
        y = op(x, w)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if form == "fused":
        assert [k.shape[2] for k in kernels] == [4]
        assert kernels[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, op(x, w, backend="torch"))
    assert gradgradcheck(op, (x, w))


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


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_inference_mode_first_spoils_nothing(op: Callable[..., Tensor], form: str) -> None:
    conv._box_on.cache_clear()
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    with torch.inference_mode():
        expected = op(x, w)
        conv._box_on(x.device, x.dtype, "up")
    torch.testing.assert_close(op(x, w).detach(), expected.clone())
    assert not conv._box_on(x.device, x.dtype, "up").is_inference()


@pytest.mark.parametrize(
    ("n", "channels", "size"), [(4, 32, 16), (2, 512, 4), (2, 8, 4)], ids=["fused", "steps", "small"]
)
def test_what_runs_is_said_and_is_the_same_without_autograd(n: int, channels: int, size: int) -> None:
    x, w = torch.randn(n, channels, size, size), torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    words = {512: "conv2d and ", 8: "PyTorch's own convolution and ", 32: "convolution of stride 2"}[channels]
    for name, op in (("upsample_conv2d", upsample_conv2d), ("conv2d_downsample", conv2d_downsample)):
        inputs = (x, w) if op is upsample_conv2d else (F.interpolate(x, scale_factor=2), w)
        first, what = next(iter(backends(name, *inputs).items()))
        assert first == "lean" and words in what
        plain = op(*inputs, backend="torch")
        torch.testing.assert_close(op(*inputs), plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(op(inputs[0].requires_grad_(), w).detach(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_has_a_crossover_of_its_own(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(16, 32, 8, 8).to(dtype, memory_format=layout)
    w = (torch.randn(32, 32, 3, 3) / 17).to(dtype, memory_format=layout)
    what = backends("upsample_conv2d", x, w)["lean"]
    assert ("stride 2" if dtype == torch.float32 else "PyTorch's own convolution") in what
    y, expected = upsample_conv2d(x, w), upsample_conv2d(x, w, backend="torch")
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(y, expected) == (dtype == torch.bfloat16)  # the very ops that are said, or others
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_a_tracer_of_any_size_may_follow_a_scaled_convolution(op: Callable[..., Tensor]) -> None:
    x, w = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)
    traced = make_fx(lambda x, w: op(x, w), tracing_mode="symbolic")(x, w)
    torch.testing.assert_close(traced(x, w), op(x, w, backend="torch"))


@pytest.mark.parametrize("op", [upsample_conv2d, conv2d_downsample])
def test_scaled_convolutions_under_autocast_round_the_kernel_once(op: Callable[..., Tensor], form: str) -> None:
    x, w = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, w)
    assert y.dtype == torch.bfloat16
    exact = op(x, w)
    assert (y.float() - exact).norm() < 0.005 * exact.norm()


def test_no_samples() -> None:
    x, w = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.ones(2, 3, 3, 3, requires_grad=True)
    y = conv2d(x, w)
    assert y.shape == (0, 2, 2, 2)
    y.sum().backward()
    assert w.grad is not None and w.grad.abs().sum() == 0


def test_linear_is_at_the_floor() -> None:
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
            r"weight must be \[O, 3, kH, kW\], got shape \(4, 2, 3, 3\)",
        ),
        ({"weight": torch.zeros(4, 3, 3, 3).double()}, TypeError, "weight must be torch.float32, got torch.float64"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\], got shape \(3,\)"),
        ({"input": torch.zeros(3, 3)}, ValueError, r"input must be \[N, C, H, W\], got 2 dimensions"),
        ({"groups": 2}, ValueError, "groups must be a divisor of the 3 channels of input, got 2"),
        ({"padding": "full"}, ValueError, "padding must be numbers, 'valid' or 'same', got 'full'"),
        (
            {"padding": "same", "stride": 2},
            ValueError,
            "padding: was 'same' with stride 2; it may be with stride 1 only",
        ),
        ({"stride": (1, 2, 3)}, ValueError, r"stride must be an integer or a pair, got \(1, 2, 3\)"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda': for conv2d it may be cpp, lean, torch"),
    ],
)
def test_conv2d_refuses(how: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": torch.zeros(2, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3, requires_grad=True), **how}
    with pytest.raises(error, match=message):
        conv2d(**given)


def test_conv_transpose2d_refuses_a_weight_of_conv2d() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[3, O/groups, kH, kW\], got shape \(4, 3, 3, 3\)"):
        conv_transpose2d(torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3))
