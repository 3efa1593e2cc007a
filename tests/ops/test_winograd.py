"""The 3x3 convolution by minimal filtering, and its gradients: those of the direct sum, whatever the sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernelcases import derivatives, random
from torch import Tensor

from fastgan.ops import conv2d, conv2d_downsample, upsample_conv2d
from fastgan.ops.conv import CONV2D
from fastgan.ops.conv_products import Geometry
from fastgan.ops.dispatch import extension
from fastgan.ops.scaled_conv import CONV2D_DOWNSAMPLE, UPSAMPLE_CONV2D

# n, i, o, h, w, padding: channels below, at and above whole vectors; odd sizes; tiles that are cut; several blocks.
SIZES = [
    (1, 1, 1, 3, 3, 0),
    (2, 3, 5, 1, 1, 1),
    (3, 17, 33, 7, 8, 0),
    (2, 16, 80, 5, 6, 2),
    (2, 64, 64, 16, 15, 1),
    (1, 130, 70, 12, 11, 1),
]
multiplies_bf16 = pytest.mark.skipif(
    extension.level() != "avx512_bf16", reason="this CPU has no products of bfloat16, and the form refuses it"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=multiplies_bf16)]
# Relative errors of norms, to second order twice as much. One rounding to bfloat16 has 1.7e-3; transformed images and
# kernels are rounded too, and the transforms enlarge that.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


def maps(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*shape, seed=seed).to(dtype).contiguous(memory_format=torch.channels_last)


def limit_of(dtype: torch.dtype, terms: int) -> float:
    return LIMITS[dtype] * (1 if terms > 1 else 6)  # the terms of a single value may cancel


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm().detach() / exact.norm().detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "i", "o", "h", "w", "padding"), SIZES)
def test_products_are_those_of_the_direct_sum(
    poison: None, n: int, i: int, o: int, h: int, w: int, padding: int, dtype: torch.dtype
) -> None:
    limit = limit_of(dtype, n * i * o)
    x, kernel, bias = maps(n, i, h, w, seed=1, dtype=dtype), maps(o, i, 3, 3, seed=2, dtype=dtype), random(o, seed=3)
    bias = bias.to(dtype)
    inputs = [t.requires_grad_() for t in (x, kernel, bias)]
    y = conv2d(x, kernel, bias, padding=padding, backend="winograd")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.conv2d(*exact, padding=padding)
    assert y.is_contiguous(memory_format=torch.channels_last) and error(y, expected) < limit
    gy = maps(*y.shape, seed=4, dtype=dtype)
    gradients = torch.autograd.grad(y, inputs, gy)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact, gy.double()), strict=True):
        assert found.dtype == dtype and error(found, wanted) < limit
    assert gradients[1].is_contiguous(memory_format=torch.channels_last)


OPS = {
    "down": (conv2d_downsample, lambda x, w, b: F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2)),
    "up": (
        upsample_conv2d,
        lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, padding=1),
    ),
}


@pytest.mark.parametrize(
    ("n", "i", "o", "h", "w"), [(1, 1, 1, 2, 2), (2, 17, 33, 6, 10), (3, 64, 64, 16, 14), (1, 20, 130, 4, 24)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", OPS)
def test_changes_of_scale_are_those_of_two_steps(
    poison: None, direction: str, n: int, i: int, o: int, h: int, w: int, dtype: torch.dtype
) -> None:
    """To second order, as a penalty needs them."""
    ours, theirs = OPS[direction]
    limit = limit_of(dtype, n * i * o)
    inputs = [maps(n, i, h, w, seed=1, dtype=dtype), maps(o, i, 3, 3, seed=2, dtype=dtype), random(o, seed=3).to(dtype)]
    inputs = [t.requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = ours(*inputs, backend="winograd"), theirs(*exact)
    assert y.is_contiguous(memory_format=torch.channels_last) and error(y, expected) < limit
    gy = maps(*y.shape, seed=4, dtype=dtype).requires_grad_()
    g2 = gy.detach().double().requires_grad_()
    first = torch.autograd.grad(y, inputs, gy, create_graph=True)
    wanted = torch.autograd.grad(expected, exact, g2, create_graph=True)
    assert all(error(a, b) < limit for a, b in zip(first, wanted, strict=True))
    u = [maps(*t.shape, seed=5, dtype=dtype) if t.ndim == 4 else None for t in inputs[:2]]
    second = torch.autograd.grad(first[:2], [*inputs[:2], gy], u)
    wanted2 = torch.autograd.grad(wanted[:2], [*exact[:2], g2], [t.double() for t in u])
    assert all(error(a, b) < 2 * limit for a, b in zip(second, wanted2, strict=True))


def test_higher_derivatives_are_those_of_torch() -> None:
    """Of other layouts too, which are copied."""
    x, w = random(2, 4, 5, 6, seed=1).float().requires_grad_(), random(3, 4, 3, 3, seed=2).float().requires_grad_()
    ours = derivatives(lambda *t: conv2d(*t, padding=1, backend="winograd"), [x, w], 3)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    for found, wanted in zip(ours, derivatives(lambda *t: F.conv2d(*t, padding=1), exact, 3), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * max(1.0, wanted.abs().max().item()))


@multiplies_bf16
@pytest.mark.parametrize("op", [conv2d, conv2d_downsample, upsample_conv2d])
def test_it_is_as_accurate_as_onednn_up_to_the_roundings_of_the_transforms(op: Callable[..., Tensor]) -> None:
    """Beside the products of the same rounded inputs in PyTorch's kernels, which round nothing but the result."""
    x, w = maps(4, 64, 16, 16, seed=1, dtype=torch.bfloat16), maps(64, 64, 3, 3, seed=2, dtype=torch.bfloat16)
    how = {"padding": 1} if op is conv2d else {}
    found = []
    for dtype, backend in (torch.float64, "torch"), (torch.bfloat16, "winograd"), (torch.bfloat16, "torch"):
        inputs = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = op(*inputs, backend=backend, **how)
        gy = maps(*y.shape, seed=3, dtype=torch.bfloat16).to(dtype)
        found.append([y, *torch.autograd.grad(y, inputs, gy)])
    exact, ours, theirs = found
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert error(a, c) < 2.8 * error(b, c)


@multiplies_bf16
@pytest.mark.parametrize("direction", OPS)
def test_autocast_reaches_it(direction: str) -> None:
    ours, _ = OPS[direction]
    inputs = [maps(2, 16, 8, 8, seed=1), maps(16, 16, 3, 3, seed=2), random(16, seed=3).float()]
    lower = [t.bfloat16() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(*inputs, backend="winograd")
        z = conv2d(*inputs, padding=1, backend="winograd")
    assert torch.equal(y, ours(*lower, backend="winograd"))
    assert torch.equal(z, conv2d(*lower, padding=1, backend="winograd"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [conv2d, conv2d_downsample, upsample_conv2d])
def test_the_number_of_threads_changes_no_bit(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, w = maps(5, 32, 34, 32, seed=1, dtype=dtype), maps(32, 32, 3, 3, seed=2, dtype=dtype)
    how = {"padding": 1} if op is conv2d else {}
    gy = maps(*op(x, w, backend="winograd", **how).shape, seed=3, dtype=dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            one = [t.clone(memory_format=torch.channels_last).requires_grad_() for t in (x, w)]
            y = op(*one, backend="winograd", **how)
            found.append([y.detach(), *torch.autograd.grad(y, one, gy)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_visible(dtype: torch.dtype, value: float) -> None:
    x, w = maps(1, 16, 8, 8, seed=1, dtype=dtype), maps(16, 16, 3, 3, seed=2, dtype=dtype)
    x[0, 3, 4, 4] = value
    y = conv2d(x, w, padding=1, backend="winograd")
    assert not y[:, :, 3:6, 3:6].isfinite().any()  # and some beside them
    assert y[:, :, :2].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "geometry", "reason"),
    [
        ((16, 16, 1, 1), {}, "kernels of 3x3"),
        ((16, 16, 3, 3), {"stride": (2, 2)}, "stride 1"),
        ((16, 8, 3, 3), {"groups": 2}, "one group"),
        ((16, 16, 3, 3), {"padding": (1, 0)}, "same padding"),
        ((16, 16, 3, 3), {"padding": (3, 3)}, "same padding"),
    ],
)
def test_what_it_cannot_run_says_why(shape: tuple[int, ...], geometry: dict[str, object], reason: str) -> None:
    values = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, **geometry}
    geometry_ = Geometry(values["stride"], values["padding"], values["dilation"], False, (0, 0), values["groups"])  # type: ignore[arg-type]
    x, w = maps(1, 16, 8, 8, seed=1), torch.zeros(shape)
    assert reason in str(CONV2D.implementations["winograd"].unsupported_reason(x, w, geometry=geometry_))
    with pytest.raises(ValueError, match=reason):
        conv2d(x, w, backend="winograd", **{k: v for k, v in values.items() if k != "transposed"})  # type: ignore[arg-type]


def test_the_shipped_table_takes_it_for_many_channels_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgan.ops.conv_products._instructions", lambda: "avx512")
    geometry = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    x, w = maps(8, 64, 16, 16, seed=1), maps(64, 64, 3, 3, seed=2)
    assert CONV2D.shipped(x, w, geometry=geometry) == "winograd"
    assert CONV2D.recorded(x, w, geometry=geometry) == "winograd"
    assert CONV2D.shipped(x.contiguous(), w, geometry=geometry) != "winograd"
    assert CONV2D.shipped(x[:, :16], w[:, :16], geometry=geometry) != "winograd"
    assert CONV2D.shipped(x.bfloat16(), w.bfloat16(), geometry=geometry) == "lean"
    reason = CONV2D.implementations["winograd"].unsupported_reason(x.bfloat16(), w.bfloat16(), geometry=geometry)
    assert reason == "bfloat16 needs a CPU with avx512_bf16"
    big = maps(4, 64, 32, 32, seed=1)
    assert CONV2D_DOWNSAMPLE.shipped(big, w) == UPSAMPLE_CONV2D.shipped(big, w) == "winograd"
    assert CONV2D_DOWNSAMPLE.recorded(big, w) == "winograd"
    with torch.autocast("cpu", torch.bfloat16):
        assert CONV2D_DOWNSAMPLE.shipped(big, w) != "winograd"
        monkeypatch.setattr("fastgan.ops.conv_products._instructions", lambda: "avx512_bf16")
        monkeypatch.setattr("fastgan.ops.conv_products.cpu_flags", lambda: frozenset({"avx512_bf16"}))
        assert CONV2D_DOWNSAMPLE.shipped(big, w) == UPSAMPLE_CONV2D.shipped(big, w) == "winograd"
        assert CONV2D.shipped(x, w, geometry=geometry) == "winograd"
        monkeypatch.setattr("fastgan.ops.conv_products.cpu_flags", lambda: frozenset({"avx512_bf16", "amx_bf16"}))
        assert CONV2D.shipped(x, w, geometry=geometry) == "lean"
    monkeypatch.setattr("fastgan.ops.conv_products._instructions", lambda: "avx2")
    assert CONV2D.shipped(x, w, geometry=geometry) == "lean"
