"""conv2d's C++ kernels, the forward product and the gradient of the input, against PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelcases import LAYOUTS, all_orders, check_errors, laid_out, opcheck, random, rounding_effects
from torch import Tensor

from fastgan import ops
from fastgan.ops import conv2d
from fastgan.ops.conv import CONV2D
from fastgan.ops.conv_products import CPP


def need(*inputs: Tensor) -> None:
    if (reason := CPP.unsupported_reason(*inputs)) is not None:
        pytest.skip(reason)


def case(n: int, i: int, o: int, size: tuple[int, int], kernel: tuple[int, int], layout: str) -> list[Tensor]:
    x, w, bias = random(n, i, *size).float(), random(o, i, *kernel, seed=1).float() / 3, random(o, seed=2).float()
    return [laid_out(x, layout), w, bias]


def check(inputs: list[Tensor], padding: tuple[int, int]) -> None:
    """Value, gradients and their gradients."""

    def run(dtype: torch.dtype, backend: str) -> list[Tensor | None]:
        made = [x.detach().to(dtype).requires_grad_() for x in inputs]
        dy = random(*F.conv2d(*inputs, padding=padding).shape, seed=3).to(dtype).requires_grad_()
        cotangents = [random(*x.shape, seed=4 + at).to(dtype) for at, x in enumerate(inputs)]
        return all_orders(lambda *t: conv2d(*t, padding=padding, backend=backend), made, dy, cotangents)

    exact = run(torch.float64, "torch")
    effects = rounding_effects(lambda: run(torch.float64, "torch"), exact)
    check_errors(run(torch.float32, "cpp"), exact, effects, torch.float32, run(torch.float32, "torch"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("n", "i", "o", "size", "kernel", "padding"),
    [
        (2, 3, 5, (7, 9), (3, 3), (1, 1)),
        (1, 1, 1, (1, 1), (1, 1), (0, 0)),
        (3, 5, 17, (8, 8), (3, 3), (1, 1)),
        (1, 7, 9, (10, 133), (3, 3), (1, 1)),
        (2, 4, 6, (12, 5), (4, 2), (3, 1)),
        (2, 17, 3, (13, 20), (3, 3), (0, 2)),
        (9, 2, 2, (2, 2), (1, 1), (0, 0)),
    ],
)
def test_equals_torch(
    n: int, i: int, o: int, size: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int], layout: str
) -> None:
    inputs = case(n, i, o, size, kernel, layout)
    need(*inputs)
    check(inputs, padding)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[list[Tensor], tuple[int, int]]:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    size = tuple(draw(st.integers(max(1, k - 2 * p), 40)) for k, p in zip(kernel, padding, strict=True))
    n, i, o = (draw(st.integers(1, top)) for top in (3, 9, 9))
    return case(n, i, o, size, kernel, draw(st.sampled_from(LAYOUTS))), padding  # type: ignore[arg-type,return-value]


@given(geometries())
@settings(max_examples=40)
def test_equals_torch_everywhere(given: tuple[list[Tensor], tuple[int, int]]) -> None:
    need(*given[0])
    check(*given)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_outputs_are_written(layout: torch.memory_format, poison: None) -> None:
    x = random(2, 3, 9, 21).float().contiguous(memory_format=layout)
    w = random(6, 3, 3, 3, seed=1).float()
    need(x, w)
    y = torch.ops.fastgan.conv2d_forward(x, w, None, 1, 1)
    gx = torch.ops.fastgan.conv2d_input_gradient(y, w, 1, 1)
    assert y.isfinite().all() and gx.isfinite().all()
    assert y.is_contiguous(memory_format=layout) and gx.is_contiguous(memory_format=layout)


def test_results_do_not_depend_on_threads() -> None:
    x, w = random(3, 16, 33, 31).float(), random(20, 16, 3, 3, seed=1).float()
    need(x, w)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = torch.ops.fastgan.conv2d_forward(x, w, None, 1, 1)
            found.append((y, torch.ops.fastgan.conv2d_input_gradient(y, w, 1, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_opcheck() -> None:
    w, bias = random(6, 3, 3, 2, seed=1).float(), random(6, seed=2).float()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = random(2, 3, 9, 8).float().contiguous(memory_format=layout)
        need(x, w)
        opcheck(torch.ops.fastgan.conv2d_forward.default, (x, w, bias, 2, 1))
        y = torch.ops.fastgan.conv2d_forward(x, w, bias, 2, 1)
        opcheck(torch.ops.fastgan.conv2d_input_gradient.default, (y, w, 2, 1))


def test_the_default_follows_channels_and_layout() -> None:
    few, many, w = torch.zeros(2, 16, 8, 8), torch.zeros(2, 64, 8, 8), torch.zeros(32, 16, 3, 3)
    need(few, w)
    if not torch.ops.fastgan.cpu_instructions().startswith("avx512"):
        pytest.skip("the crossovers were measured with AVX-512")
    assert next(iter(ops.backends("conv2d", few, w))) == "cpp"
    assert next(iter(ops.backends("conv2d", many, torch.zeros(64, 64, 3, 3)))) == "lean"
    assert next(iter(ops.backends("conv2d", few.to(memory_format=torch.channels_last), w))) == "lean"
    first = torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert next(iter(ops.backends("conv2d", first, torch.zeros(16, 3, 3, 3)))) == "cpp"
    assert next(iter(ops.backends("conv2d", few.double(), w.double()))) == "lean"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"stride": 2}, "it supports stride 1, dilation 1 and one group"),
        ({"padding": 3}, "it supports paddings below the kernel's size and"),
        (
            {"input": torch.zeros(2, 3, 5, 5).double(), "weight": torch.zeros(4, 3, 3, 3).double()},
            "it supports float32",
        ),
    ],
)
def test_argument_errors(how: dict[str, Any], words: str) -> None:
    given = {"input": torch.zeros(2, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3), **how}
    with pytest.raises(ValueError, match=f"backend 'cpp': {words}"):
        conv2d(**given, backend="cpp")
    assert CONV2D.choose(None, given["input"].double(), given["weight"].double()) == "lean"


def test_unbatched_same_padding_and_autocast() -> None:
    x, w = random(3, 9, 8).float().requires_grad_(), random(4, 3, 2, 3, seed=1).float().requires_grad_()
    need(x[None], w)
    for track in (True, False):
        with torch.set_grad_enabled(track):
            y = conv2d(x, w, padding="same", backend="cpp")
        assert (y - F.conv2d(x, w, padding="same")).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv2d(x, w).dtype == torch.bfloat16
