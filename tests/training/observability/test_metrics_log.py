"""Progress lines, metrics.jsonl and TensorBoard events of a run."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from fastgan.training.observability.metrics_log import MetricsLog, _without_events
from fastgan.training.run_setup import _last_images


def test_a_last_batch_beyond_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, active=True, total=1000, seen=0)
    row = {"images": 1024, "step": 8, "resolution": 16, "alpha": 1.0, "images_per_second": 100.0}
    log.metrics({**row, "loss_g": 0.5, "loss_d": 1.5}, 0.0)
    log.close()
    output = capsys.readouterr().out
    assert "1.0/1 kimg" in output and output.rstrip().endswith("  0.0 s left"), output
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["images"] == 1024


def test_event_file_that_cannot_be_written_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    reported: list[object] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    log = MetricsLog(tmp_path, active=True, total=1000, seen=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    row = {"images": 64, "resolution": 16, "alpha": 1.0, "images_per_second": 100.0, "loss_g": 0.5, "loss_d": 1.5}
    with pytest.raises(OSError, match="No space left"):
        log.metrics(row, 1.0)
        log.close()
    deadline = time.monotonic() + 20  # the thread's hook runs after its error is raised here
    while any(type(thread).__module__.startswith("tensorboard.") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert reported == []


def test_errors_of_other_threads_are_reported_as_before() -> None:
    reported: list[object] = []
    error = threading.ExceptHookArgs((OSError, OSError("x"), None, threading.current_thread()))
    _without_events(error, reported.append)
    assert reported == [error]


def test_rows_that_cannot_be_read_do_not_stop_a_resumed_run(tmp_path: Path) -> None:
    """A byte that is not UTF-8, JSON nested too deeply, and rows of other types are dropped; good rows stay."""
    good = [b'{"images": 64}\n', b'{"images": 128}\n']
    bad = [b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"[1]\n", b'{"images": "many"}\n', b'{"images": 1e999}\n']
    late = [b'{"images": 256}\n', b'{"images": 1']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([good[0], good[1], *bad]))
    assert _last_images(path) == 128
    path.write_bytes(b"".join([good[0], *bad, good[1], *late]))
    MetricsLog(tmp_path, active=True, total=1000, seen=128).close()
    assert path.read_bytes() == b"".join(good)
