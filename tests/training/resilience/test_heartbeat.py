"""Ranks that fail are named by the others, in one line, and nobody waits: processes without torch's groups."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastgan.config import Schedule
from fastgan.training.distributed.rank_consistency import accumulation_for
from fastgan.training.resilience.slurm import first_host, set_rank_variables

RANK = """
import json, sys, time
from pathlib import Path
from fastgan.training.resilience import heartbeat
from fastgan.training.resilience.heartbeat import Heartbeat
heartbeat._START = 0.5
rank, folder, does = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
told = folder / "told"
def broadcast(value):
    if rank == 0:
        (folder / "part").write_text(json.dumps(value))
        (folder / "part").rename(told)
        return value
    while not told.exists():
        time.sleep(0.01)
    return json.loads(told.read_text())
heartbeat_ = Heartbeat(rank, 3, 0, "127.0.0.1", float(sys.argv[4]), broadcast, sys.argv[5:])
(folder / f"up{rank}").touch()
while not all((folder / f"up{r}").exists() for r in range(3)):
    time.sleep(0.01)
heartbeat_.run, heartbeat_.last_good = Path("RUN"), Path("RUN/checkpoints/kimg-1")
(folder / f"ready{rank}").touch()
with heartbeat_.guard():
    time.sleep(0.5)
    if does == "lost":
        raise RuntimeError("gloo: Connection closed by peer")
    if does == "bug":
        raise KeyError("mistake")
    if does == "mute":
        heartbeat_._beat = 1e9
    if does in ("mute", "meet"):
        for _ in range(30):
            heartbeat_.together()
            time.sleep(0.1)
    time.sleep(60 if does == "hang" else 1)
heartbeat_.close()
"""


def _ranks(
    tmp_path: Path, *does: str, stderr: int = subprocess.PIPE, timeout: float = 5, hosts: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    line = [sys.executable, "-c", RANK]
    return [
        subprocess.Popen([*line, str(rank), str(tmp_path), what, str(timeout), *hosts], stderr=stderr, text=True)
        for rank, what in enumerate(does)
    ]


def _up(tmp_path: Path) -> None:
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(3)):
        time.sleep(0.01)


def _end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    error = process.communicate(timeout=30)[1]
    return process.returncode, error.splitlines()


@pytest.mark.parametrize("failed", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_that_dies_or_falls_silent_is_named(tmp_path: Path, failed: int, number: int) -> None:
    processes = _ranks(tmp_path, "hang", "hang", "hang")
    _up(tmp_path)
    began = time.monotonic()
    processes[failed].send_signal(number)
    what = "its connection closed" if number == signal.SIGKILL else "no sign of life for"
    for rank in {0, 1, 2} - {failed}:
        code, lines = _end(processes[rank])
        assert code == 75 and len(lines) == 1, lines
        assert f"rank {failed} on " in lines[0] and what in lines[0]
        assert "kimg-1; go on with --resume RUN" in lines[0]
    assert time.monotonic() - began < 9  # the timeout is 5
    processes[failed].kill()
    processes[failed].communicate()


@pytest.mark.parametrize(("hosts", "named"), [([], "a host not known"), (["h1", "h1", "h2"], "h2")])
def test_rank_that_does_not_come_is_named(tmp_path: Path, hosts: list[str], named: str) -> None:
    """Its host may still be starting, for a while beyond the timeout."""
    for process in _ranks(tmp_path, "hang", "hang", timeout=2, hosts=hosts):
        code, lines = _end(process)
        assert code == 75 and len(lines) == 1, lines
        assert f"rank 2 on {named}: it did not come within 3 s; there is no checkpoint yet" in lines[0]


def test_a_line_that_nobody_reads_holds_nobody_up(tmp_path: Path) -> None:
    """A launcher behind a dead link leaves its pipe full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    first, second, third = _ranks(tmp_path, "hang", "hang", "hang", stderr=writing)
    _up(tmp_path)
    third.kill()
    assert [process.wait(timeout=30) for process in (first, second)] == [75, 75]
    for end in (reading, writing):
        os.close(end)


def test_rank_that_has_a_bug_says_so_to_all(tmp_path: Path) -> None:
    first, second, third = (_end(p) for p in _ranks(tmp_path, "hang", "bug", "hang"))
    assert "Traceback" in second[1][0]
    for code, lines in (first, third):
        assert code == 75 and len(lines) == 1 and "rank 1 on" in lines[0] and "KeyError: 'mistake'" in lines[0]


def test_rank_that_others_wait_for_is_named(tmp_path: Path) -> None:
    first, _, third = (_end(p) for p in _ranks(tmp_path, "lost", "hang", "lost"))
    for code, lines in (first, third):
        assert code == 75 and len(lines) == 1 and "rank 1 on" in lines[0] and "alive, but not where" in lines[0]


@pytest.mark.parametrize("mute", [0, 1])
def test_rank_that_is_not_heard_but_met_is_alive(tmp_path: Path, mute: int) -> None:
    """Collectives go on where the watch's connection has not yet recovered from a break of the link."""
    does = ["meet", "meet", "meet"]
    does[mute] = "mute"
    assert [_end(p) for p in _ranks(tmp_path, *does, timeout=2)] == [(0, [])] * 3


def test_ranks_that_are_done_leave_in_any_order(tmp_path: Path) -> None:
    assert [_end(p) for p in _ranks(tmp_path, "done", "done", "done")] == [(0, [])] * 3


def test_srun_is_a_launcher() -> None:
    assert [first_host(n) for n in ("a1", "n[07-09,12],g3", "n[3,5]-ib", "x,y")] == ["a1", "n07", "n3-ib", "x"]
    task = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    task |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[07-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
    environment = dict(task)
    set_rank_variables(environment)
    found = {key: value for key, value in environment.items() if not key.startswith("SLURM")}
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n07",
                     "MASTER_PORT": "20616"}  # fmt: skip
    for other in ({**task, "RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {}):
        before = dict(other)
        set_rank_variables(other)
        assert other == before


def test_accumulation_makes_up_for_ranks() -> None:
    schedule = Schedule(batch=16, batch_at={128: 8})
    assert [accumulation_for(4, world, schedule, [4, 8]) for world in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert accumulation_for(16, 1, schedule, [64, 128]) == 8  # no more parts than images
    assert accumulation_for(4, 3, schedule, [4]) is None
