"""Whole steps: both sides compute the same, arithmetic is counted over both backwards; and the studies beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies import precision_quality as quality
from benchmarks.studies import process_settings
from benchmarks.studies.result_cache import ResultCache
from benchmarks.training import whole_steps
from fastgan import ops

SMALL = {"pggan-32": 8, "wgan-gp-64": 16, "dcgan-64": 16, "sagan-64": 64}


@pytest.mark.parametrize("name", list(SMALL))
def test_both_sides_compute_the_same(name: str) -> None:
    case = dataclasses.replace(whole_steps.CASES[name], resolution=SMALL[name], batch=4)
    assert whole_steps.difference(case, "fp32") < whole_steps.TOLERANCE["fp32"]


def test_a_wrong_side_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(whole_steps.CASES["pggan-32"], resolution=8, batch=4)
    monkeypatch.setattr(whole_steps.plain, "pixel_norm", lambda x: x)
    assert whole_steps.difference(case, "fp32") > whole_steps.TOLERANCE["fp32"]


@pytest.mark.parametrize("arm", ["plain", "ours-fp32", "ours-bf16"])
def test_arms_train(arm: str) -> None:
    case = dataclasses.replace(whole_steps.CASES["wgan-gp-64"], resolution=8, batch=4)
    step = whole_steps.arm(case, arm)
    step()
    assert whole_steps.flops(step) > 1e6


@pytest.mark.parametrize(("conv", "products"), [(nn.functional.conv2d, 4), (ops.conv2d, 3)])
def test_flops_of_a_penalty(conv: Callable[..., Tensor], products: int) -> None:
    """Forward, input gradient and its weight gradient; plain PyTorch also makes a gradient that nobody needs."""
    w, x = torch.randn(5, 3, 3, 3, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)
    one = 2 * 2 * 5 * 64 * 27

    def step() -> None:
        (gradient,) = torch.autograd.grad(conv(x, w, padding=1).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), w)

    assert whole_steps.flops(step) == products * one


def cell(distance: float, precision: float = 0.5, recall: float = 0.5) -> dict[str, object]:
    curve = [{"kimg": 1.0, "frechet_distance": 4 * distance}, {"kimg": 2.0, "frechet_distance": distance}]
    return {"frechet_distance": distance, "precision": precision, "recall": recall, "curve": curve}


def test_verdict() -> None:
    full = [cell(10), cell(12), cell(14)]
    assert quality.verdict(full, [cell(14), cell(20), cell(20)]) == "yes"
    assert quality.verdict(full, [cell(1), cell(2), cell(3)]) == "yes"
    assert quality.verdict(full, [cell(15), cell(16), cell(17)]) == "no: frechet distance"
    assert quality.verdict(full, [cell(12, 0.5, 0.4)] * 3) == "no: recall"
    assert quality.verdict(full, [cell(12), cell(12), {"diverged": "step 3"}]) == "no: diverged"
    assert quality.verdict(full, [cell(12), cell(12)]) == "-"


def test_table_of_precisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ResultCache(tmp_path / "cells.json")
    for precision, distances in (("fp32", (10, 12, 14)), ("bf16", (11, 12, 13))):
        for seed, distance in enumerate(distances):
            cache.store(f"digits/gan/{precision}/seed{seed}/400kimg", cell(distance))
    cache.store("speed/gan", {"fp32": 3.0, "bf16": 2.0})
    assert quality.main(["--table", "--variants", "gan", "--results", str(cache.file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `gan` | fp32 | 400 | 3 | 0 | 12.0 (10.0 to 14.0) |")
    assert lines[3].startswith("| `gan` | bf16 | 400 | 3 | 0 | 12.0 (11.0 to 13.0) |")
    assert "| 1.50x |" in lines[3] and lines[3].endswith("| yes |")


def test_distance_at_equal_time_and_reasons(tmp_path: Path) -> None:
    assert quality.at_equal_time([cell(10)], 2.0, 2.0) == [40.0]
    assert quality.at_equal_time([cell(10)], 2.0, 4 / 3) == [25.0]
    log = tmp_path / "run.log"
    assert quality.diverged(tmp_path / "run") is None
    log.write_text("a\nfastgan: step 3: loss of the generator was not finite; there is no checkpoint yet\nb\n")
    assert "step 3" in str(quality.diverged(tmp_path / "run"))
    log.write_text("fastgan: step 9: loss_d leapt to 981, and stays for 5 rows; start again with ...\n")
    assert "stays" in str(quality.diverged(tmp_path / "run"))


def test_settings_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    for name, own in process_settings.SETTINGS.items():
        found = process_settings.environment(name, 3)
        assert {**found, **own, "OMP_NUM_THREADS": "3"} == found and "MALLOC_TOP_PAD_" not in found
        assert ("OMP_WAIT_POLICY" in found) == ("OMP_WAIT_POLICY" in own)
    values = {"seconds": [0.1, 0.3, 0.2], "peak": 2e6}
    table = process_settings.report(
        {"pggan-32/plain/quiet/as it is/0": values, "pggan-32/plain/quiet/memory kept/0": values}
    )
    assert "| pggan-32 | plain | quiet | memory kept | 200 (200 to 200) | 1.00x | 2 |" in table
