"""What measured steps say of the machine they ran on."""

from __future__ import annotations

import os

import pytest
import torch

from fastgan.cli.train import parse
from fastgan.training import step_measurement
from fastgan.training.step_measurement import Bench, scatter_of


@pytest.mark.parametrize(
    ("seconds", "scatter"),
    [([1.0], 0.0), ([1.0, 1.0, 1.0], 0.0), ([0.9, 1.0, 1.0, 1.0, 50.0], 0.0), ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 3)],
)
def test_scatter_is_that_of_the_middle_half(seconds: list[float], scatter: float) -> None:
    assert scatter_of(seconds) == pytest.approx(scatter)


def test_a_measurement_notes_how_its_steps_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 0.1, 0.3])  # the first step is not counted, and the last one times gradients

    def step(*_: object) -> tuple[float, ...]:
        d = next(times, 1.0)
        return d, d, 0.0, 0.0

    flags = "--variant dcgan --data digits --width 8 --max-width 8 --latent 4 --batch 8 --resolution 8"
    flags = [*flags.split(), "--precision", "fp32"]
    bench = Bench(parse(flags).config, torch.device("cpu"), 1, 0.5)
    monkeypatch.setattr(Bench, "_step", staticmethod(step))
    monkeypatch.setattr(Bench, "_gradients", lambda *_: [(), ()])
    timing = bench.time(8, 8, False)
    assert timing.d.seconds == pytest.approx(0.2) and bench.scatters == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("scatter", "load", "device", "said"),
    [
        (0.4, 0.0, "cpu", "steps scatter by 40%, the load is 0.0 on 2 cores"),
        (0.0, 1.6, "cpu", "scatter by 10%, the load is 1.6"),
        (0.2, 0.9, "cpu", None),  # what this process itself adds
        (0.0, 9.0, "cuda", None),
        (0.4, 0.0, "cuda", "scatter by 40%"),
    ],
)
def test_a_busy_machine_is_named(
    scatter: float, load: float, device: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(step_measurement, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    line = step_measurement.busy([0.1, scatter], torch.device(device))
    assert (line is None) if said is None else (line is not None and said in line)
