"""Questions about compiled programs, on recorded operations that run one by one."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import pytest
import torch

from benchmarks.studies import compiled_programs as study
from benchmarks.training.whole_steps import CASES, CPU, Case
from fastgan.training.compiling.build import new_step, recordings

PGGAN = dataclasses.replace(
    CASES["pggan-32"], resolution=8, batch=4, changes={"networks": {"latent": 8, "fmap_base": 64, "fmap_max": 8}}
)


SMALL = dataclasses.replace(
    CASES["wgan-gp-64"], resolution=8, batch=4, changes={"networks": {"latent": 8, "width": 8, "max_width": 8}}
)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(recorded: Any, options: dict[str, Any]) -> Any:
        if "memory_planning" in options:
            raise RuntimeError("refused\nand so on")
        return functools.partial(study._run, recorded.graph, recorded.arguments)

    monkeypatch.setattr(study, "compiled", compiled)


def asked(question: str, case: Case = SMALL) -> str:
    arms = ["as it is", "memory planned", "contracted"]
    return study.QUESTIONS[question](case, argparse.Namespace(arms=arms, precision="fp32", rounds=1))


def test_options_that_are_refused_are_an_answer(interpreted: None) -> None:
    text = asked("options")
    assert text.count("contracted | ") == 2 and "| memory planned |" not in text
    assert text.endswith("memory planned, generator: RuntimeError: refused")


@pytest.mark.slow  # it records four programs
def test_a_fade_has_more_arithmetic(interpreted: None) -> None:
    counted = dict(part.rsplit(" ", 1) for part in asked("fades", PGGAN).rpartition("GFLOP: ")[2].split(", "))
    assert float(counted["fades in/discriminator"]) > float(counted["stable/discriminator"]) > 0
    assert asked("fades") == "only pggan fades"


def test_recorded_operations_are_near_float64(interpreted: None) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in asked("rounding").splitlines()[2:]]
    everything = [row for row in rows if row[1] == "all"]
    assert [row[0] for row in everything] == ["discriminator", "generator"] and len(rows) > 8
    for row in everything:
        assert float(row[2]) == 0.0 and 1e-8 < float(row[4]) < 1e-2 and float(row[5]) > 1e-8


def test_a_graph_in_float64_has_no_other_type() -> None:
    spec = study.spec_of(SMALL, "bf16")
    (_, recorded), *_ = recordings(spec, new_step(spec, CPU))
    assert "bfloat16" in recorded.graph.code
    wide = study.in_float64(recorded.graph)
    assert "bfloat16" not in wide.code and "torch.float32" not in wide.code
    assert torch.float64 in {node.kwargs.get("dtype") for node in wide.graph.nodes}
