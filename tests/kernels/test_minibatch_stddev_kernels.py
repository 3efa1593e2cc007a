"""minibatch_stddev kernels against the composed form in float64; and compiled ahead of time."""

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
)

from fastgan.kernels import minibatch_stddev as kernels

op = importlib.import_module("fastgan.ops.minibatch_stddev")  # the name in fastgan.ops is the function

# (N, C, H, W), samples in a group, features
SHAPES = [
    ((8, 3, 5, 3), 4, 1),
    ((6, 4, 3, 3), 3, 2),
    ((1, 1, 1, 1), 1, 1),
    ((4, 5, 2, 2), 1, 1),
    ((5, 6, 1, 2), 5, 3),
]
LARGE = [((16, 256, 64, 64), 4, 1), ((12, 512, 4, 4), 4, 4), ((8, 33, 31, 17), 8, 3)]


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
@pytest.mark.parametrize(
    ("shape", "group", "features"), [*SHAPES, *(pytest.param(*it, marks=pytest.mark.gpu) for it in LARGE)]
)
@pytest.mark.parametrize("last", [False, True])
def test_matches_composed_form(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    group: int,
    features: int,
    last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cpu":
        monkeypatch.setattr(kernels, "TILE", 32)
    form = torch.channels_last if last else torch.contiguous_format
    x, u = (random(*shape, seed=i).to(device, dtype, memory_format=form) for i in range(2))
    n, c, h, w = shape
    dy = random(n, c + features, h, w, seed=2).to(device, dtype, memory_format=form)
    settings = (group, features, 1e-3)
    t = op.backward(dy, x, *settings)[1]
    for name, arguments in (
        ("forward", (x, *settings)),
        ("backward", (dy, x, *settings)),
        ("second_backward", (u, x, t, *settings)),
    ):
        with running(device):
            result = getattr(kernels, f"minibatch_stddev_{name}")(*arguments)
        exact = getattr(op, name)(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
        plain = getattr(op, name)(*arguments)
        results = [(result, exact, plain)] if name == "forward" else list(zip(result, exact, plain, strict=True))
        for i, (a, e, p) in enumerate(results):
            assert a.stride() == p.stride()
            if i == 0 and name != "backward":  # a copy, and the maps
                assert torch.equal(a[:, :c], p[:, :c])
                a, e, p = (it[:, c:] for it in (a, e, p))
            assert_accurate(a, e, p, f"{name} {i}", arguments)


COMPILED = compiled_cases(
    ARCHITECTURES, (torch.bfloat16, torch.float32), (torch.contiguous_format, torch.channels_last), ((4, 1), (16, 4)),
    share=2, quick=lambda name, dtype, form, groups: name in QUICK and dtype == torch.bfloat16 and groups == (4, 1),
)  # fmt: skip


@pytest.mark.parametrize(("architecture", "dtype", "form", "groups"), COMPILED)
def test_compiles_without_spills(
    architecture: str,
    dtype: torch.dtype,
    form: torch.memory_format,
    groups: tuple[int, int],
    record_property: Callable[[str, object], None],
) -> None:
    group, features = groups
    dtype = torch.float16 if architecture == "sm_75" else dtype  # it has no bfloat16

    def passes() -> None:
        x = torch.empty(16, 256, 64, 64, dtype=dtype, device="meta").to(memory_format=form)
        dy = torch.empty(16, 256 + features, 64, 64, dtype=dtype, device="meta").to(memory_format=form)
        kernels.minibatch_stddev_forward(x, group, features, 1e-8)
        _, t = kernels.minibatch_stddev_backward(dy, x, group, features, 1e-8)
        kernels.minibatch_stddev_second_backward(x, x, t, group, features, 1e-8)

    assert_compiles_without_spills(architecture, passes, record_property)
