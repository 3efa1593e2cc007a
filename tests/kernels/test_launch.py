"""Launches that skip Triton's own classification of arguments give the compiled kernel what Triton gives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_offline  # noqa: F401  (skips where there is no Triton)
from torch import Tensor

from benchmarks.ops import launch_cost
from fastgan.kernels import attention, bias_act, bias_act_pixel_norm, counter_rng, minibatch_stddev, scaled_conv
from fastgan.kernels.ahead_of_time import replaced_kernels

Call = tuple[int, tuple[int, ...], list[Any]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """What a driver that launches nothing is given: compiled kernel, grid and arguments."""
    calls: list[Call] = []

    class Launcher:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *given: Any) -> None:
            calls.append((id(self), (x, y, z), [seen(it) for it in given[4:]]))

    def seen(value: Any) -> Any:
        return (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value

    monkeypatch.setattr(launch_cost.StubDriver, "launcher_cls", Launcher)

    def forget_all() -> None:
        """What is compiled for this driver must not meet another one."""
        for plans in (bias_act._plan, bias_act_pixel_norm._plan, minibatch_stddev._shape):
            plans.cache_clear()
        for plans in (attention._plan, scaled_conv._plan, counter_rng._plan):
            plans.cache_clear()
        with replaced_kernels(lambda kernel: kernel.device_caches.clear() or kernel):
            pass

    with launch_cost.without_gpu():
        forget_all()
        yield calls
        forget_all()


def test_later_launches_are_like_the_first(launched: list[Call]) -> None:
    x, bias = torch.randn(2, 16, 4, 4), torch.randn(16)

    def call(x: Tensor, bias: Tensor | None = bias, act: int = 2, slope: float = 0.2) -> Call:
        bias_act.bias_act_forward(x, bias, act, slope, 1.0)
        return launched[-1]

    first = call(x)
    assert call(x) == first and call(x.clone(), bias.clone()) == first and len(launched) == 3
    assert call(x, slope=0.3)[:2] == first[:2]  # a number, not a constant
    shifted = torch.randn(x.numel() + 1)[1:].view(x.shape)
    # Another type, alignment, act, or no bias is another kernel.
    others = [call(x.bfloat16()), call(shifted), call(x, act=1), call(x, None), call(x, bias.bfloat16())]
    assert len({it[0] for it in (first, *others)}) == 6
    for again, other in zip((x.bfloat16(), shifted), others, strict=False):
        assert call(again) == other


@pytest.mark.slow
def test_every_launcher(launched: list[Call]) -> None:
    for name, call in launch_cost.calls().items():
        call()
        first = launched.copy()
        launched.clear()
        call()
        assert launched == first and first, name
        launched.clear()
