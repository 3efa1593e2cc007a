"""bias_act kernels against the composed form in float64; and compiled ahead of time."""

from __future__ import annotations

import importlib
from collections.abc import Callable

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

from fastgan.kernels import bias_act as kernels

op = importlib.import_module("fastgan.ops.bias_act")  # the name in fastgan.ops is the function

SHAPES = [(2, 3, 5, 3), (1, 1, 1, 1), (3, 17, 2, 2), (2, 5)]
LARGE = [(4, 64, 33, 31), (16, 256, 64, 64), (2, 512, 4, 4)]
LAYOUTS = [
    *((it, last) for it in SHAPES for last in ((False, True) if len(it) == 4 else (False,))),
    *(pytest.param(it, last, marks=pytest.mark.gpu) for it in LARGE for last in (False, True)),
]


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
@pytest.mark.parametrize("act", op.ACTS)
@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_matches_composed_form(
    device: str,
    dtype: torch.dtype,
    act: str,
    shape: tuple[int, ...],
    last: bool,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "TILE", 32 if device == "cpu" else kernels.TILE)
    form = torch.channels_last if last else torch.contiguous_format
    x, dy, u = (random(*shape, seed=i).to(device, dtype, memory_format=form) for i in range(3))
    b = random(shape[1], seed=3).to(device, dtype) if bias else None
    code = op.ACTS.index(act)
    settings = (code, 0.2, 1.5)
    y = op.forward(x, b, *settings)
    ref = {op.LINEAR: None, op.SILU: x}.get(code, y)
    given = b if code == op.SILU else None
    calls = [("forward", (x, b, *settings)), ("backward", (dy, ref, given, *settings, bias))]
    if code not in op.PIECEWISE_LINEAR:
        calls.append(("second_backward", (u, dy, ref, given, *settings, bias)))
    for name, arguments in calls:
        with running(device):
            results = values(getattr(kernels, f"bias_act_{name}")(*arguments))
        composed = getattr(op, name)
        wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
        exact, plain = values(composed(*wide)), values(composed(*arguments))
        for i, (a, e, p) in enumerate(zip(results, exact, plain, strict=True)):
            assert_accurate(a, e, p, f"{name} {i}", arguments)
            if a.ndim == 4:
                assert a.stride() == p.stride()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradient_passes_through_nan(device: str) -> None:
    dy, ref = torch.ones(1, 3, device=device), torch.tensor([[-1.0, torch.nan, 1.0]], device=device)
    with running(device):
        dx = values(kernels.bias_act_backward(dy, ref, None, op.RELU, 0.2, 1.5, False))[0]
    torch.testing.assert_close(dx, torch.tensor([[0.0, 1.5, 1.5]], device=device))


COMPILED = compiled_cases(
    ARCHITECTURES, (torch.bfloat16, torch.float32), (torch.contiguous_format, torch.channels_last), op.ACTS, share=4,
    quick=lambda name, dtype, form, act: name in QUICK and dtype == torch.bfloat16 and act == "lrelu",
)  # fmt: skip


@pytest.mark.parametrize(("architecture", "dtype", "form", "act"), COMPILED)
def test_compiles_without_spills(
    architecture: str,
    dtype: torch.dtype,
    form: torch.memory_format,
    act: str,
    record_property: Callable[[str, object], None],
) -> None:
    code = op.ACTS.index(act)

    dtype = torch.float16 if architecture == "sm_75" else dtype  # it has no bfloat16

    def passes() -> None:
        x = torch.empty(16, 256, 64, 64, dtype=dtype, device="meta").to(memory_format=form)
        b = torch.empty(256, dtype=torch.float32, device="meta")
        given = b if code == op.SILU else None
        kernels.bias_act_forward(x, b, code, 0.2, 1.5)
        kernels.bias_act_backward(x, x, given, code, 0.2, 1.5, True)
        if code not in op.PIECEWISE_LINEAR:
            kernels.bias_act_second_backward(x, x, x, given, code, 0.2, 1.5, True)

    assert_compiles_without_spills(architecture, passes, record_property)
