"""Kernels of random numbers are used where they have the bits of the definition, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastgan.kernels
from fastgan.utils import counter_kernels, counter_rng
from fastgan.utils.counter_rng import DEFINITION

CPU = torch.device("cpu")
KEY = 99
STEP = 2**13  # of the 2^23 values, so that a test takes no time


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stands for the kernels, on the CPU, whose tensors say that they are on a GPU."""
    stub = SimpleNamespace(**DEFINITION)
    monkeypatch.setattr(fastgan.kernels, "counter_rng", stub, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "fastgan.kernels.counter_rng", stub)
    monkeypatch.setattr(counter_kernels, "_usable", {})
    compare = counter_kernels.first_difference
    monkeypatch.setattr(counter_kernels, "first_difference", lambda *given: compare(*given, step=STEP))
    yield stub


def test_every_value_can_be_asked_for() -> None:
    bits = torch.tensor([0, 1, -1, 2**62, -(2**63), 0x123456789ABCDEF])
    assert torch.equal(counter_rng._bits(KEY, counter_kernels.index_of(bits, KEY), 1)[:, 0], bits)
    radius = counter_kernels.index_of(torch.tensor([counter_kernels._UNIT_RADIUS]) << 41, KEY)
    assert counter_rng._normal(KEY, radius, 2)[0, 0].item() == pytest.approx(1.0, abs=2e-7)


def test_all_values_of_radius_and_angle_are_compared() -> None:
    """With every value, each of the 2^23 occurs once in the angle and once in the radius."""
    step = 2**12
    values = torch.arange(0, 2**23, step)
    radii, angles = [], []
    for name, key, index, size in counter_kernels._draws(CPU, step):
        if name == "normal" and len(index) > 100:
            bits = counter_rng._bits(key, index, 1)[:, 0]
            assert size == 2
            radii.append(bits >> 41 & 2**23 - 1)
            angles.append(bits >> 1 & 2**23 - 1)
    assert torch.equal(radii[0], values) and torch.equal(angles[1], values)


def test_equal_kernels_are_used(kernels: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert counter_kernels.usable(torch.arange(3), DEFINITION) is kernels
    assert capsys.readouterr().err == ""


def test_one_wrong_bit_is_seen_and_told_once(kernels: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a logarithm that is wrong by a rounding for one number in thousands."""

    def wrong(key: int, index: Tensor, size: int) -> Tensor:
        z = counter_rng._normal(key, index, size)
        third = counter_rng._bits(key, index, 1)[:, 0] >> 41 & 2**23 - 1 == 3 * STEP
        return torch.where(third[:, None], torch.nextafter(z, torch.tensor(9.0)), z)

    kernels.normal = wrong
    for _ in range(2):
        assert counter_kernels.usable(torch.arange(3), DEFINITION) is None
    told = capsys.readouterr().err
    assert told.count("fastgan: ") == 1 and "normal differs" in told and "please report it" in told


def test_a_kernel_that_fails_is_not_used(kernels: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(key: int, index: Tensor, size: int) -> Tensor:
        raise RuntimeError("no image for this device\nand more")

    kernels.uniform = fails
    assert counter_kernels.usable(torch.arange(3), DEFINITION) is None
    assert "(RuntimeError: no image for this device)" in capsys.readouterr().err


def test_nothing_is_compared_while_a_graph_is_captured(
    kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(counter_kernels, "is_plain", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert counter_kernels.usable(index, DEFINITION) is None  # type: ignore[arg-type]
    assert counter_kernels._usable == {}
    counter_kernels._usable[index.device] = kernels
    assert counter_kernels.usable(index, DEFINITION) is kernels  # type: ignore[arg-type]


def test_a_recording_has_torchs_operations(kernels: SimpleNamespace) -> None:
    """A launch would leave nothing in a graph."""
    seen: list[Any] = []

    def draw(index: Tensor) -> Tensor:
        seen.append(counter_kernels.usable(index, DEFINITION))
        return counter_rng.normal(0, "x", index, 4)

    index = torch.arange(8)
    graph = make_fx(draw)(index)
    torch.vmap(lambda i: draw(i[None]))(index)
    torch.jit.trace(draw, (index,), check_trace=False)
    assert seen and all(it is None for it in seen)
    assert torch.equal(graph(index + 5), counter_rng.normal(0, "x", index + 5, 4))


@pytest.mark.gpu
def test_a_gpu_draws_by_kernels_also_in_a_graph() -> None:
    index = torch.arange(64, device="cuda")
    counter_rng.normal(0, "x", index, 512)
    assert counter_kernels._usable[index.device] is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = counter_rng.normal(0, "x", index, 512)
        u = counter_rng.uniform(0, "x", index, 7)
    index.add_(1000)
    graph.replay()
    key = counter_rng._key(0, "x")
    assert torch.equal(z, DEFINITION["normal"](key, index, 512))
    assert torch.equal(u, DEFINITION["uniform"](key, index, 7))
