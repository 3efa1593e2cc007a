"""Other ranks name a failed rank in one line and do not wait for it; in processes without torch's process groups."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastgan.config import Schedule
from fastgan.training.checkpoints.resume import accumulation_for
from fastgan.training.resilience.heartbeat import Heartbeat
from fastgan.training.resilience.slurm import first_host, set_rank_variables

RANK = """
import json, sys, time
from pathlib import Path
from fastgan.training.resilience import heartbeat
from fastgan.training.resilience.heartbeat import Heartbeat
heartbeat._START = 0.5
rank, folder, action = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sent = folder / "sent"
def broadcast(value):
    if rank == 0:
        (folder / "part").write_text(json.dumps(value))
        (folder / "part").rename(sent)
        return value
    while not sent.exists():
        time.sleep(0.01)
    return json.loads(sent.read_text())
watch = Heartbeat(rank, 3, 0, "127.0.0.1", float(sys.argv[4]), broadcast, sys.argv[5:])
(folder / f"connected{rank}").touch()
while not all((folder / f"connected{r}").exists() for r in range(3)):
    time.sleep(0.01)
watch.run, watch.last_good = Path("RUN"), Path("RUN/checkpoints/kimg-1")
(folder / f"ready{rank}").touch()
with watch.guard():
    time.sleep(0.5)
    if action == "lost":
        raise RuntimeError("gloo: Connection closed by peer")
    if action == "bug":
        raise KeyError("mistake")
    if action == "mute":
        watch._interval = 1e9
    if action in ("mute", "meet"):
        for _ in range(30):
            watch.note_collective()
            time.sleep(0.1)
    time.sleep(60 if action == "hang" else 1)
watch.close()
"""


def _ranks(
    tmp_path: Path, *actions: str, stderr: int = subprocess.PIPE, timeout: float = 5, hosts: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    line = [sys.executable, "-c", RANK]
    return [
        subprocess.Popen([*line, str(rank), str(tmp_path), action, str(timeout), *hosts], stderr=stderr, text=True)
        for rank, action in enumerate(actions)
    ]


def _wait_until_ready(tmp_path: Path) -> None:
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(3)):
        time.sleep(0.01)


def _end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    error = process.communicate(timeout=30)[1]
    return process.returncode, error.splitlines()


@pytest.mark.parametrize("failed", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_that_dies_or_hangs_is_named(tmp_path: Path, failed: int, number: int) -> None:
    processes = _ranks(tmp_path, "hang", "hang", "hang")
    _wait_until_ready(tmp_path)
    began = time.monotonic()
    processes[failed].send_signal(number)
    what = "its connection closed" if number == signal.SIGKILL else "no heartbeat for"
    for rank in {0, 1, 2} - {failed}:
        code, lines = _end(processes[rank])
        assert code == 75 and len(lines) == 1, lines
        assert f"rank {failed} on " in lines[0] and what in lines[0]
        assert "kimg-1; resume with --resume RUN" in lines[0]
    assert time.monotonic() - began < 9  # the timeout is 5
    processes[failed].kill()
    processes[failed].communicate()


@pytest.mark.parametrize(("hosts", "named"), [([], "an unknown host"), (["h1", "h1", "h2"], "h2")])
def test_rank_that_does_not_connect_is_named(tmp_path: Path, hosts: list[str], named: str) -> None:
    """Hosts may start later than others, so the wait is longer than the timeout."""
    for process in _ranks(tmp_path, "hang", "hang", timeout=2, hosts=hosts):
        code, lines = _end(process)
        assert code == 75 and len(lines) == 1, lines
        assert f"rank 2 on {named}: it did not connect within 3 s; there is no checkpoint yet" in lines[0]


def test_full_stderr_does_not_block_the_exit(tmp_path: Path) -> None:
    """A launcher behind a dead link does not empty its pipe."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    first, second, third = _ranks(tmp_path, "hang", "hang", "hang", stderr=writing)
    _wait_until_ready(tmp_path)
    third.kill()
    assert [process.wait(timeout=30) for process in (first, second)] == [75, 75]
    for end in (reading, writing):
        os.close(end)


def test_exception_of_a_rank_is_reported_to_all(tmp_path: Path) -> None:
    first, second, third = (_end(p) for p in _ranks(tmp_path, "hang", "bug", "hang"))
    assert "Traceback" in second[1][0]
    for code, lines in (first, third):
        assert code == 75 and len(lines) == 1 and "rank 1 on" in lines[0] and "KeyError: 'mistake'" in lines[0]


def test_rank_outside_the_collective_is_named(tmp_path: Path) -> None:
    first, _, third = (_end(p) for p in _ranks(tmp_path, "lost", "hang", "lost"))
    for code, lines in (first, third):
        assert (
            code == 75
            and len(lines) == 1
            and "rank 1 on" in lines[0]
            and "alive, but not in the collective" in lines[0]
        )


@pytest.mark.parametrize("mute", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_collectives_count_as_heartbeats(tmp_path: Path, mute: int) -> None:
    """Collectives may work while the heartbeat's connection has not yet recovered from a break of the link."""
    actions = ["meet", "meet", "meet"]
    actions[mute] = "mute"
    assert [_end(p) for p in _ranks(tmp_path, *actions, timeout=2)] == [(0, [])] * 3


def test_finished_ranks_leave_in_any_order(tmp_path: Path) -> None:
    assert [_end(p) for p in _ranks(tmp_path, "done", "done", "done")] == [(0, [])] * 3


def test_srun_is_a_launcher() -> None:
    assert [first_host(n) for n in ("a1", "n[07-09,12],g3", "n[3,5]-ib", "x,y")] == ["a1", "n07", "n3-ib", "x"]
    task = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    task |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[07-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
    environment = dict(task)
    set_rank_variables(environment)
    variables = {key: value for key, value in environment.items() if not key.startswith("SLURM")}
    assert variables == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n07",
        "MASTER_PORT": "20616",
    }
    for other in ({**task, "RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {}):
        before = dict(other)
        set_rank_variables(other)
        assert other == before


def test_accumulation_keeps_the_cut_of_the_batch() -> None:
    schedule = Schedule(batch=16, batch_at={128: 8})
    assert [accumulation_for(4, world, schedule, [4, 8]) for world in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert accumulation_for(16, 1, schedule, [64, 128]) == 8  # at most one part for each image
    assert accumulation_for(4, 3, schedule, [4]) is None


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_hung_rank_is_named_before_a_launcher_kills_the_rest(tmp_path: Path) -> None:
    """torchrun kills all ranks when the first one ends: the line must be out by then."""
    ranks = _ranks(tmp_path, "hang", "hang", "hang")
    _wait_until_ready(tmp_path)
    ranks[2].send_signal(signal.SIGSTOP)
    while all(rank.poll() is None for rank in ranks[:2]):
        time.sleep(0.001)
    for rank in ranks:
        rank.kill()
    _, lines = _end(ranks[0])
    assert len(lines) == 1 and "rank 2 on" in lines[0] and "no heartbeat" in lines[0]
    for rank in ranks[1:]:
        rank.communicate()


@pytest.mark.parametrize(
    "line", [b"[" * 60_000, b"\xff", b'{"token": 1e999}', b"7", b'{"token": "t", "rank": 1e999, "host": "h"}']
)
def test_what_a_stranger_sends_closes_its_connection_and_nothing_else(line: bytes) -> None:
    ports: list[tuple[int, str, str]] = []

    def broadcast(own: tuple[int, str, str]) -> tuple[int, str, str]:
        ports.append(own)
        return own

    watch = Heartbeat(0, 1, 0, "127.0.0.1", 30, broadcast)
    port, token, _ = ports[0]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(line.replace(b'"t"', f'"{token}"'.encode()) + b"\n")
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                continue
    assert watch._thread.is_alive()
    watch.close()
    assert not watch._thread.is_alive()
