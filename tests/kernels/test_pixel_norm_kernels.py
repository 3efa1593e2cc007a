"""bias_act_pixel_norm and pixel_norm, which share kernels, against the composed form in float64; and compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_offline import (
    ARCHITECTURES,
    DTYPES,
    QUICK,
    assert_accurate,
    assert_compiles_without_spills,
    compiled_cases,
    random,
    running,
    values,
)

from fastgan.kernels import bias_act_pixel_norm as kernels
from fastgan.kernels import pixel_norm

op = importlib.import_module("fastgan.ops.bias_act_pixel_norm")  # the name in fastgan.ops is the function
plain_op = importlib.import_module("fastgan.ops.pixel_norm")

SHAPES = [(2, 3, 5, 3), (1, 1, 1, 1), (2, 17, 2, 2), (2, 5)]
LARGE = [(4, 64, 33, 31), (16, 256, 64, 64), (2, 512, 4, 4), (2, 5000, 3, 3)]
LAYOUTS = [
    *((it, last) for it in SHAPES for last in ((False, True) if len(it) == 4 else (False,))),
    *(pytest.param(it, last, marks=pytest.mark.gpu) for it in LARGE for last in (False, True)),
]
each_layout = pytest.mark.parametrize(("shape", "last"), LAYOUTS)


def compare(name: str, call: Callable[..., object], composed: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Compare every result of a launcher, called with `args`, with the composed form."""

    device = next(a for a in args if isinstance(a, Tensor)).device.type
    with running(device):
        results = values(call(*args))
    exact = values(composed(*(a.double() if isinstance(a, Tensor) else a for a in args)))
    plain = values(composed(*args))
    for i, (a, e, p) in enumerate(zip(results, exact, plain, strict=True)):
        assert_accurate(a, e, p, f"{name} {i}", args)
        if a.ndim == 4:
            assert a.stride() == p.stride() or a.shape[1] == 1


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
@pytest.mark.parametrize("act", [op.ACTS[a] for a in op.PIECEWISE_LINEAR])
@each_layout
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_matches_composed_form(
    device: str,
    dtype: torch.dtype,
    act: str,
    shape: tuple[int, ...],
    last: bool,
    split: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """split: feature vectors do not fit in registers."""
    if split:
        monkeypatch.setattr(kernels, "LARGEST", 4)
    if device == "cpu":
        monkeypatch.setattr(kernels, "TILE", 16)
    form = torch.channels_last if last else torch.contiguous_format
    x, dy, u = (random(*shape, seed=i).to(device, dtype, memory_format=form) for i in range(3))
    bias = random(shape[1], seed=3).to(device, torch.float32) if act != "linear" else None
    settings = (op.ACTS.index(act), 0.2, 1.5)
    y, r = op.forward(x, bias, *settings, 1e-3)
    want = bias is not None
    compare("forward", kernels.bias_act_pixel_norm_forward, op.forward, (x, bias, *settings, 1e-3))
    compare("backward", kernels.bias_act_pixel_norm_backward, op.backward, (dy, y, r, *settings, want))
    arguments = (u, dy, y, r, *settings, want)
    compare("second_backward", kernels.bias_act_pixel_norm_second_backward, op.second_backward, arguments)


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
@each_layout
def test_pixel_norm_matches_composed_form(device: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool) -> None:
    form = torch.channels_last if last else torch.contiguous_format
    x, dy, u = (random(*shape, seed=i).to(device, dtype, memory_format=form) for i in range(3))
    y, r = plain_op.forward(x, 1e-8)
    compare("forward", pixel_norm.pixel_norm_forward, plain_op.forward, (x, 1e-8))
    compare("backward", pixel_norm.pixel_norm_backward, plain_op.backward, (dy, y, r))
    compare("second_backward", pixel_norm.pixel_norm_second_backward, plain_op.second_backward, (u, dy, y, r))


COMPILED = compiled_cases(
    ARCHITECTURES, (torch.bfloat16, torch.float32), (torch.contiguous_format, torch.channels_last),
    (256, 16, 512, 1024, 5000), share=4,
    quick=lambda name, dtype, form, channels: name in QUICK and dtype == torch.bfloat16 and channels == 256,
)  # fmt: skip


@pytest.mark.parametrize(("architecture", "dtype", "form", "channels"), COMPILED)
def test_compiles_without_spills(
    architecture: str,
    dtype: torch.dtype,
    form: torch.memory_format,
    channels: int,
    record_property: Callable[[str, object], None],
) -> None:
    dtype = torch.float16 if architecture == "sm_75" else dtype  # it has no bfloat16

    def passes() -> None:
        x = torch.empty(16, channels, 64, 64, dtype=dtype, device="meta").to(memory_format=form)
        r = torch.empty(16, 1, 64, 64, dtype=torch.float32, device="meta")
        b = torch.empty(channels, dtype=torch.float32, device="meta")
        kernels.bias_act_pixel_norm_forward(x, b, op.LRELU, 0.2, 1.5, 1e-8)
        kernels.bias_act_pixel_norm_backward(x, x, r, op.LRELU, 0.2, 1.5, True)
        kernels.bias_act_pixel_norm_second_backward(x, x, x, r, op.LRELU, 0.2, 1.5, True)

    assert_compiles_without_spills(architecture, passes, record_property)
