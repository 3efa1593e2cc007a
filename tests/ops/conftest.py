"""Fixtures of the tests of kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan import ops
from fastgan.ops import qualification
from fastgan.ops.qualification import measurement
from fastgan.ops.qualification.measurement import Measurement, measure


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills uninitialized memory with NaN, in C++ too."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Measurements are on, in a cache of the test's own; the folder of that cache."""
    ops.backends("pixel_norm", torch.zeros(2, 3))  # the C++ library comes from the usual cache
    environment = dict(os.environ)
    os.environ.pop("FASTGAN_QUALIFY", None)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    monkeypatch.setattr(measurement, "_SECONDS", 0.01)
    monkeypatch.setattr(measurement, "interruptions", lambda: 0)
    qualification.configure(enabled=True)
    yield tmp_path / "fastgan" / "qualification"
    os.environ.clear()
    os.environ.update(environment)
    qualification.configure(enabled=True)


@pytest.fixture
def calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that were measured, one entry for each time."""
    measured: list[str] = []

    def counted(op: Any, *arguments: Any) -> dict[str, Measurement]:
        measured.append(op.name)
        return measure(op, *arguments)

    monkeypatch.setattr(qualification, "measure", counted)
    return measured
