"""benchmarks/training/bench_convert.py: its critics compute the same when converted, with fewer products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastgan.nn
from benchmarks.training import bench_convert, critics

Products = Callable[[Callable[[], object]], int]
TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "residual": (lambda: critics.residual(8), (2, 3, 8, 8)),
    "mlp": (lambda: critics.mlp(8), (4, 1, 28, 28)),
    "blurred": (lambda: critics.blurred(2), (1, 3, 128, 128)),
    "biggan": (lambda: critics.biggan(8), (2, 3, 8, 8)),
}
# Convolution-sized products of a penalty, plain and converted. Attention curves: the biggan critic's products in it and
# in the layers before it stay.
PRODUCTS = {"residual": (65, 44), "mlp": (0, 0), "blurred": (233, 98), "biggan": (89, 73)}


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(critics, "CRITICS", TINY)
    monkeypatch.setattr(bench_convert, "CRITICS", TINY)
    return request.param


@pytest.mark.parametrize("run", [bench_convert.Training.penalty, lambda t: t.step(True), lambda t: t.step(False)])
def test_sides_agree(name: str, run: Callable[[Any], Any]) -> None:
    plain, lean = (run(bench_convert.Training(name, torch.float64, converted)) for converted in (False, True))
    torch.testing.assert_close(
        [g for g in lean if g is not None], [g for g in plain if g is not None], rtol=1e-9, atol=1e-9
    )


def test_a_step_starts_from_the_same_state(name: str) -> None:
    training = bench_convert.Training(name, torch.float64, True)
    torch.testing.assert_close(training.step(True), training.step(True), rtol=0, atol=0)


def test_products(name: str, products: Products) -> None:
    counted = tuple(
        products(bench_convert.Training(name, torch.float32, converted).penalty) for converted in (False, True)
    )
    assert counted == PRODUCTS[name]


def test_nothing_is_left_that_sends_zeros(name: str) -> None:
    training = bench_convert.Training(name, torch.float32, True)
    found = fastgan.nn.report(training.critic, training.real)
    assert not any(layer.zeros for layer in found.layers)
    assert not found.fell_through
    plain = fastgan.nn.report(bench_convert.Training(name, torch.float32, False).critic, training.real)
    assert any(layer.zeros for layer in plain.layers)
