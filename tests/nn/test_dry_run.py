"""`report`: what sends zeros, what curves, what falls through, and that nothing is left behind."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgan.nn
from fastgan import ops
from fastgan.nn import dry_run
from fastgan.nn.dry_run import Layer, PenaltyReport


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.act = nn.ReLU(True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.smooth = nn.SiLU()
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.drop = nn.Dropout(0.3)
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Linear(64, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.smooth(self.second(self.act(self.first(x))))
        y = F.leaky_relu(self.drop(self.norm(y)), 0.2) * scale
        return self.last(self.pool(y).flatten(1))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def by_name(report: fastgan.nn.PenaltyReport) -> dict[str, fastgan.nn.dry_run.Layer]:
    return {layer.name: layer for layer in report.layers}


def test_what_sends_zeros_and_what_curves() -> None:
    model = Critic()
    found = fastgan.nn.report(model, X)
    layers = by_name(found)
    assert layers["act"].zeros == {"ThresholdBackwardBackward": 1} and not layers["act"].curves
    assert layers["pool"].zeros == {"AvgPool2DBackwardBackward": 1}
    assert layers[""].zeros == {"LeakyReluBackwardBackward": 1}
    assert layers["smooth"].curves and not layers["smooth"].zeros
    assert layers["norm"].curves
    for name in ("first", "second", "last", "drop"):
        assert not layers[name].zeros and not layers[name].curves, name
    assert found.seconds > 0 and 0 <= found.wasted < found.seconds
    text = str(found)
    assert "sends zeros: relu 1" in text and "curves: " in text
    assert ": 2 that send zeros, and what computes less where none arrive" in text
    assert "next: fastgan.nn.convert(critic) and change the calls named above (one that is left " in text
    assert "(model) Critic: calls in forward: take leaky_relu from fastgan.functional or fastgan.ops" in text


def test_report_counts_what_convert_replaces() -> None:
    """Spectral norms, in-place and parametrized layers, subclasses and activations of transformers among them."""

    class Mine(nn.ReLU):
        pass

    model = Critic()
    model.extra = nn.ModuleList([Mine(), nn.TransformerEncoderLayer(4, 1), nn.utils.spectral_norm(nn.Linear(4, 4))])
    found = fastgan.nn.report(model, X)
    assert {type(module).__name__ for module in model.modules()} >= {"ReLU", "Mine", "AvgPool2d"}  # nothing is changed
    converted = fastgan.nn.convert(model)
    assert found.replaceable == converted.replaced and found.replaceable["SpectralNorm"] == 2
    assert str(converted).split(";")[0].removeprefix("replaced ") in str(found)
    assert not fastgan.nn.report(model, X).replaceable


def test_the_largest_rows_come_first_and_empty_ones_are_counted() -> None:
    layers = [
        Layer("0", "Conv2d", seconds=0.2),
        Layer("1", "ReLU", Counter(ThresholdBackwardBackward=1), seconds=0.001, wasted=0.001, convertible=True),
        Layer("2", "Flatten"),
        Layer("3", "Conv2d", seconds=0.799, wasted=0.499),
    ]
    found = PenaltyReport(layers, Counter(), 1.0, 0.5, Counter(Conv2d=2, ReLU=1), 7)
    assert str(found).splitlines() == [
        "layer     share  zeros  in second order",
        "3 Conv2d    80%    50%  sends nothing",
        "0 Conv2d    20%     0%  sends nothing",
        "1 ReLU       0%     0%  sends zeros: relu 1",
        "and 1 more, each below 0.5%",
        "one penalty with its weight gradients: 1000.0 ms (median of 7 runs), 50% of it on zeros",
        "fastgan.nn.convert(critic) replaces Conv2d 2, ReLU 1: 1 that send zeros, and what computes less where none "
        "arrive",
        "next: fastgan.nn.convert(critic), then report again; without zeros a penalty takes about 500.0 ms, 2.00 times "
        "as fast",
    ]


def test_times_are_medians_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run that another program disturbs does not count."""
    taken = iter([9.0, 0.1, 5.0, 0.2, 0.3])  # the first one warms up

    def penalty(run: Any, x: Tensor, args: Any, kwargs: Any) -> None:
        run.layers = {"": Layer("", "Flatten", seconds=next(taken))}

    monkeypatch.setattr(dry_run._Run, "penalty", penalty)
    monkeypatch.setattr(dry_run, "_FEWEST_RUNS", 4)
    monkeypatch.setattr(dry_run, "_SECONDS", 0.0)
    found = fastgan.nn.report(nn.Flatten(), X)
    assert (found.seconds, found.layers[0].seconds, found.runs) == (0.25, 0.25, 4)


def test_after_convert_only_calls_in_forward_are_left() -> None:
    model = Critic()
    fastgan.nn.convert(model)
    found = fastgan.nn.report(model, X)
    assert {layer.name for layer in found.layers if layer.zeros} == {""}
    assert "convert(critic)" not in str(found)


def test_nothing_is_wasted_in_a_lean_critic() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2, True), nn.Flatten(), nn.Linear(144, 1))
    plain = fastgan.nn.report(model, X)
    fastgan.nn.convert(model)
    lean = fastgan.nn.report(model, X)
    assert plain.wasted > 0 and lean.wasted == 0
    assert all(not layer.zeros and not layer.curves for layer in lean.layers)


def test_a_layer_without_a_lean_form_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softshrink(), nn.Flatten(), nn.Linear(144, 1))
    found = fastgan.nn.report(model, X)
    assert by_name(found)["1"].zeros == {"SoftshrinkBackwardBackward": 1}
    assert "1 Softshrink: no lean form of SoftshrinkBackwardBackward" in str(found)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x.mean((2, 3)).to(torch.complex64), self.weight).abs()


def test_what_fell_through_is_counted() -> None:
    found = fastgan.nn.report(Odd(), X)
    assert found.fell_through == {("linear", "torch.complex64"): 1}
    assert "linear: 1 calls left to torch's own function (torch.complex64)" in str(found)


def test_the_model_is_left_as_it_was() -> None:
    model = Critic()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    fastgan.nn.report(model, X, scale=2.0)
    fastgan.nn.report(model, X.requires_grad_(), 2.0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and X.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_critic_that_is_linear_has_no_penalty() -> None:
    found = fastgan.nn.report(nn.Sequential(nn.Flatten()), X)
    assert str(found).endswith("next: nothing; no layer sends zeros") and found.wasted == 0
