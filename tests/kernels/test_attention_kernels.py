"""Attention kernels against float64, in all layouts and for every missing cotangent; and compiled ahead of time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from triton_offline import (
    DEVICES,
    DTYPES,
    QUICK,
    WITH_PRODUCTS,
    assert_accurate,
    assert_compiles_without_spills,
    assert_launches_do_not_spill,
    compiled_cases,
    random,
    running,
)

from fastgan.kernels import attention, launch, tile_candidates, tiles, tune_ahead_of_time

OPS = ("forward", "backward_rows", "backward_columns", "second_statistics", "second_rows", "second_columns")
NAMES = ("o", "dq", "dk", "dv", "gq", "gk", "gv", "gdo")
SCALE = 0.3

# (N, M, d, dv, causal). Interpreted with tiles of 16 x 16; on a GPU with those of tiles.json.
SHAPES = [
    (1, 1, 1, 1, False),
    (3, 1, 8, 16, True),
    (17, 30, 5, 40, False),
    (32, 16, 33, 16, False),
    (33, 17, 3, 8, True),
    (16, 40, 16, 1, True),
]
LARGE = [
    *((n, n, 64, 64, causal) for n in (63, 100, 127, 129, 1025) for causal in (False, True)),
    *((257, 129, d, 32, True) for d in (1, 8, 40, 59, 111, 256)),
    (1024, 256, 32, 128, False),
    (100, 300, 8, 256, False),
]
EVERY_SHAPE = [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.gpu) for shape in LARGE)]


def inputs(
    n: int, m: int, d: int, dv: int, device: str, dtype: torch.dtype, batch: int = 1, heads: int = 2
) -> list[Tensor]:
    """q, k, v, do and the three cotangents."""
    sizes = [(n, d), (m, d), (m, dv), (n, dv), (n, d), (m, d), (m, dv)]
    return [random(batch, heads, *size, seed=i).to(device, dtype) for i, size in enumerate(sizes)]


def plain(arguments: list[Tensor], used: tuple[bool, ...], causal: bool, dtype: torch.dtype) -> list[Tensor]:
    """o, first and second derivatives, by autograd through plain matrix products in `dtype`."""
    q, k, v, do, *cotangents = (x.detach().to(dtype) for x in arguments)
    for x in (q, k, v, do):
        x.requires_grad_()
    logits = q @ k.transpose(-1, -2) * SCALE
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).tril().logical_not(), -torch.inf)
    o = torch.softmax(logits, -1) @ v
    first = torch.autograd.grad(o, (q, k, v), do, create_graph=True)
    outputs, seeds = zip(*[(g, u) for g, u, use in zip(first, cotangents, used, strict=True) if use], strict=True)
    second = torch.autograd.grad(outputs, (q, k, v, do), seeds, allow_unused=True)
    second = [torch.zeros_like(x) if g is None else g for g, x in zip(second, (q, k, v, do), strict=True)]
    return [x.detach() for x in (o, *first, *second)]


@contextlib.contextmanager
def small_tiles(device: str) -> Iterator[None]:
    tile = tiles.Tile(16, 16, 4, 1, 32)
    with running(device), tiles.override({f"attention_{op}": tile for op in OPS} if device == "cpu" else {}):
        yield


def ours(arguments: list[Tensor], used: tuple[bool, ...], causal: bool) -> list[Tensor]:
    q, k, v, do, *cotangents = arguments
    with small_tiles(q.device.type):
        o, lse = attention.attention_forward(q, k, v, SCALE, causal)
        first = attention.attention_backward(do, q, k, v, o, lse, SCALE, causal)
        given = [u if use else None for u, use in zip(cotangents, used, strict=True)]
        second = attention.attention_second_backward(*given, do, q, k, v, o, lse, SCALE, causal)
    return [o, *first, *second]


def compare(arguments: list[Tensor], causal: bool, used: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    results = ours(arguments, used, causal)
    exact = plain(arguments, used, causal, torch.float64)
    simple = plain(arguments, used, causal, arguments[0].dtype)
    for name, a, b, c in zip(NAMES, results, exact, simple, strict=True):
        assert_accurate(a, b, c, name, arguments)
    return results


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
@pytest.mark.parametrize(("n", "m", "d", "dv", "causal"), EVERY_SHAPE)
def test_every_result_is_as_accurate_as_plain_pytorch(
    device: str, dtype: torch.dtype, n: int, m: int, d: int, dv: int, causal: bool
) -> None:
    compare(inputs(n, m, d, dv, device, dtype), causal)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [it for it in itertools.product((True, False), repeat=3) if any(it)][1:])
def test_missing_cotangents(device: str, used: tuple[bool, bool, bool]) -> None:
    compare(inputs(20, 18, 4, 16, device, torch.float32, heads=1), False, used)


def test_no_cotangents_give_zeros() -> None:
    q, k, v, do, *_ = inputs(4, 5, 3, 2, "cpu", torch.float32)
    for x in attention.attention_second_backward(None, None, None, do, q, k, v, do, do[..., 0], SCALE, False):
        assert not x.any()


def heads_inside(x: Tensor) -> Tensor:
    """Memory in the order [B, N, H, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def features_first(x: Tensor) -> Tensor:
    """Memory in the order [B, H, d, N], as a convolution leaves it."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def with_gaps(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide[..., 1::2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [heads_inside, features_first, with_gaps])
def test_any_strides(device: str, layout: Callable[[Tensor], Tensor]) -> None:
    o, dq, *_ = compare([layout(x) for x in inputs(20, 8, 5, 4, device, torch.float16)], True)
    if layout is features_first:
        assert o.stride()[-2:] == dq.stride()[-2:] == (1, 20)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_inputs(device: str) -> None:
    arguments = inputs(20, 8, 5, 4, device, torch.float16, batch=2)
    arguments[1] = arguments[1][:, :1].expand(2, 2, 8, 5)
    arguments[3] = arguments[3][..., :1, :1].expand(2, 2, 20, 4)
    compare(arguments, False)


@pytest.mark.parametrize("device", DEVICES)
def test_64_bit_offsets_do_not_change_results(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(20, 8, 5, 4, device, torch.float32, heads=1)
    expected = ours(arguments, (True,) * 3, True)
    monkeypatch.setattr(attention, "needs_int64_offsets", lambda *layouts, dims: True)
    monkeypatch.setattr(attention, "_plan", attention._plan.__wrapped__)  # what is cached has 32 bits
    for a, b in zip(ours(arguments, (True,) * 3, True), expected, strict=True):
        assert torch.equal(a, b)


def test_64_bit_offsets_are_used_if_needed() -> None:
    def layout(x: Tensor) -> launch.Layout:
        return x.shape, x.stride()

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float16, device="meta")

    # Heads always have 64-bit offsets.
    assert not launch.needs_int64_offsets(layout(meta(64, 64, 2**20, 64)), dims=2)
    assert launch.needs_int64_offsets(layout(meta(1, 1, 2**25, 64)), dims=2)
    assert launch.needs_int64_offsets(layout(meta(8, 8)), layout(meta(1, 64, 2**25).transpose(1, 2)), dims=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits_stay_finite(device: str, causal: bool) -> None:
    q, k, *rest = inputs(20, 18, 4, 4, device, torch.float32, heads=1)
    for x in ours([q * 100, k * 300, *rest], (True,) * 3, causal):
        assert x.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_bit_identical_between_runs(device: str) -> None:
    arguments = inputs(20, 18, 8, 8, device, torch.float16)
    for a, b in zip(*(ours(arguments, (True,) * 3, False) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "m", "heads"), [(0, 3, 2), (3, 0, 2), (3, 4, 0)])
def test_empty_inputs(n: int, m: int, heads: int) -> None:
    for x in ours(inputs(n, m, 4, 5, "cpu", torch.float32, heads=heads), (True,) * 3, False):
        assert not x.any()


def test_odd_strides_use_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def lookup(op: str, kind: str, size: int, where: tiles.Place, odd: bool) -> tiles.Tile:
        seen.append(odd)
        return tiles.Tile(16, 16, 4, 1, 16)

    monkeypatch.setattr(tiles, "lookup", lookup)
    monkeypatch.setattr(attention, "_plan", attention._plan.__wrapped__)
    for n, d, transposed in ((20, 16, False), (20, 8, False), (32, 8, True), (20, 8, True), (32, 11, True)):
        q, k, v, *_ = (x.float() for x in inputs(n, n, d, d, "cpu", torch.float32, heads=1))
        if transposed:
            q, k, v = map(features_first, (q, k, v))
        with running("cpu"):
            attention.attention_forward(q, k, v, SCALE, False)
    assert seen == [False, True, False, True, False]


FORMS = [
    (size, form)
    for size in tile_candidates.SIZES
    for odd in (False, True)
    for form in tune_ahead_of_time.forms(size, odd)
]
COMPILED = compiled_cases(
    WITH_PRODUCTS, tiles.KINDS, FORMS, share=5,
    quick=lambda name, kind, form: name in QUICK and kind == "half" and form == (64, "even"),
)  # fmt: skip


@pytest.mark.parametrize(("architecture", "kind", "size_and_form"), COMPILED)
def test_compiles_without_spills(
    architecture: str, kind: str, size_and_form: tuple[int, str], record_property: Callable[[str, object], None]
) -> None:
    """In bfloat16, TF32 and exact float32, in the forms of kernels/tune_ahead_of_time.py, which checks them all."""
    size, form = size_and_form
    launches = tune_ahead_of_time.launches_of_form(architecture, kind, size, form)
    assert len(launches) == len(OPS)
    assert_launches_do_not_spill(architecture, launches, record_property)


@pytest.mark.parametrize("case", ["ones", "expanded"])
def test_compiles_with_constant_sizes_and_strides(case: str, record_property: Callable[[str, object], None]) -> None:
    """Triton turns sizes and strides of 1 into constants."""
    one = torch.empty(1, 1, 1, 1, device="meta")
    q, k = (one, one) if case == "ones" else (torch.empty(2, 2, 64, 16, device="meta"), one.expand(2, 2, 64, 16))
    small = dict.fromkeys((f"attention_{op}" for op in OPS), tiles.Tile(16, 16, 4, 1, 16))
    with tiles.override(small):
        assert_compiles_without_spills(
            "sm_90", partial(tune_ahead_of_time.run_all_passes, q, k, k, q, True), record_property
        )
