"""What a run says of itself while it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgan.training.log import Log


def test_a_last_batch_that_reaches_beyond_the_end_leaves_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, active=True, total=1000, seen=0)
    row = {"images": 1024, "step": 8, "resolution": 16, "alpha": 1.0, "images_per_second": 100.0}
    log.metrics({**row, "loss_g": 0.5, "loss_d": 1.5})
    log.close()
    said = capsys.readouterr().out
    assert "1.0/1 kimg" in said and said.rstrip().endswith("  0m00s left"), said
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["images"] == 1024
