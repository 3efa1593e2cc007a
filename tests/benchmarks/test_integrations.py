"""benchmarks/training/bench_integrations.py: both sides compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training import bench_integrations


@pytest.mark.parametrize("name", bench_integrations.CASES)
def test_sides_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_integrations, "WIDTH", 16)
    by_name, exact = bench_integrations.sides(name, 16)
    for side in by_name.values():
        found = [x.double() for x in side()]
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=1e-5 * float(exact[1].abs().max()))
    assert exact[1].abs().max() > 0
