"""What the tests of qualification share: a new process, and times in place of a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan import ops
from fastgan.ops import qualification
from fastgan.ops.qualification import measurement

ROOT = Path(ops.__file__).parents[2]
CPU = torch.device("cpu")


def anew() -> None:
    """As a new process: nothing is known but what is in the cache."""
    qualification.configure(enabled=True)


def without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_times", lambda op, key, cases, names: dict.fromkeys(names, (1.0, 1.0)))


def with_times(monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
    """Microseconds of each implementation, in place of a clock."""
    monkeypatch.setattr(
        measurement, "_times", lambda op, key, cases, names: {n: (times[n], 1.0) for n in names if n in times}
    )


def entry(folder: Path) -> dict[str, Any]:
    """The one class in the cache."""
    (file,) = folder.glob("*.json")
    (found,) = json.loads(file.read_text())["classes"].values()
    return dict(found)
