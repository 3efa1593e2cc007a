"""Progress lines, metrics.jsonl and TensorBoard events of a run."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from fastgan.training.observability.metrics_log import MetricsLog, _without_events
from fastgan.training.run_setup import _images_seen


def test_a_last_batch_beyond_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, active=True, total=1000, seen=0)
    row = {"images": 1024, "step": 8, "resolution": 16, "alpha": 1.0, "images_per_second": 100.0}
    log.metrics({**row, "loss_g": 0.5, "loss_d": 1.5}, 0.0)
    log.close()
    output = capsys.readouterr().out
    assert "1.024/1 kimg" in output and output.rstrip().endswith("  0.0 s left"), output
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
    assert _images_seen(tmp_path) == 128
    path.write_bytes(b"".join([good[0], *bad, good[1], *late]))
    log = MetricsLog(tmp_path, active=True, total=1000, seen=128)
    log.metrics({"images": 192, "resolution": 8, "alpha": 1.0, "images_per_second": 1.0, "loss_d": 1.0}, 0.0)
    log.close()
    *kept, new = path.read_bytes().splitlines(keepends=True)
    assert kept == good and json.loads(new)["images"] == 192


def test_a_record_is_not_shortened_before_the_first_new_row(tmp_path: Path) -> None:
    rows = b"".join(b'{"images": %d}\n' % n for n in (64, 128, 192))
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    log = MetricsLog(tmp_path, active=True, total=1000, seen=64)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows
    for seen in (96, 128):
        log.evaluation(seen, {"features": "digits", "metrics": {}})
    log.close()
    found = [json.loads(line)["images"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [64, 96, 128]


@pytest.mark.parametrize(
    ("metrics", "sheets", "seen"),
    [
        (None, [], 0),
        (b'{"images": 1', [], 0),  # a kill in the middle of the first row
        (b"\xff\xfe\n", [], None),
        (b"\xff\xfe\n", ["kimg-000000.064.png"], 64),
        (None, ["kimg-000000.064.png", "kimg-000001.000.png", "kimg-x.png"], 1000),
        (b'{"images": 2000}\n', ["kimg-000001.000.png"], 2000),
    ],
)
def test_progress_is_seen_in_metrics_or_samples(
    tmp_path: Path, metrics: bytes | None, sheets: list[str], seen: int | None
) -> None:
    (tmp_path / "samples").mkdir()
    for name in sheets:
        (tmp_path / "samples" / name).touch()
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_bytes(metrics)
    assert _images_seen(tmp_path) == seen
