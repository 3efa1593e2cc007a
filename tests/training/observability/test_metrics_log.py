"""What a run says of itself while it goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from fastgan.training.observability.metrics_log import Log, _without_events


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


def test_events_that_cannot_be_written_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    log = Log(tmp_path, active=True, total=1000, seen=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    row = {"images": 64, "resolution": 16, "alpha": 1.0, "images_per_second": 100.0, "loss_g": 0.5, "loss_d": 1.5}
    with pytest.raises(OSError, match="No space left"):
        log.metrics(row)
        log.close()
    deadline = time.monotonic() + 20  # a thread's hook runs after the error is known
    while any(type(thread).__module__.startswith("tensorboard.") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert told == []


def test_errors_of_other_threads_are_told_as_ever() -> None:
    told: list[object] = []
    error = threading.ExceptHookArgs((OSError, OSError("x"), None, threading.current_thread()))
    _without_events(error, told.append)
    assert told == [error]
