"""`--max-restarts`: a run that is killed goes on by itself, and ends as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgan import checkpoint, train
from fastgan.errors import ArgumentError
from fastgan.training.liveness import FAULT
from fastgan.training.supervisor import Supervision, Supervisor, asked, rank_hosts, read_hostfile

SCRIPT = Path(train.__file__)
FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 0.8 --fade-kimg 0.2 "
    "--stable-kimg 0.4 --checkpoint-kimg 0.1 --keep 50 --samples 4 --deterministic --threads 1"
).split()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the child to kill in /proc")
def test_killed_process_is_started_again_and_ends_bit_identical(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    line = [sys.executable, str(SCRIPT), *FLAGS]
    assert subprocess.run([*line, "--out", str(whole)], stdout=subprocess.DEVNULL).returncode == 0
    supervised = subprocess.Popen([*line, "--out", str(run), "--max-restarts", "1"], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
    while len(checkpoint.existing(run)) < 3:
        assert supervised.poll() is None
        time.sleep(0.02)
    os.kill(_children(supervised.pid)[0], signal.SIGKILL)
    said = supervised.communicate(timeout=120)[1]
    assert supervised.returncode == 0, said
    assert "a fault (exit code 137); restarting from" in said and "start 2" in said
    for name in ("generator.safetensors", "training.safetensors"):
        ours, theirs = (load_file(checkpoint.existing(path)[-1] / name) for path in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_name_of_the_supervisors_own_goes_with_a_run_that_is_refused(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--max-restarts", "1", "--batch", "9", "--accumulation", "2"]
    refused = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "--batch: was 9" in refused.stderr
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_whose_reader_goes_saves_and_stops(tmp_path: Path) -> None:
    """As `| head` does, or a launcher that was killed: nothing goes on unwatched, and nothing is lost."""
    run = tmp_path / "run"
    line = [sys.executable, str(SCRIPT), *FLAGS, "--kimg", "1000", "--log-kimg", "0.1"]
    job = subprocess.Popen([*line, "--out", str(run)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert job.stdout is not None
    while "img/s" not in job.stdout.readline():
        assert job.poll() is None
    job.stdout.close()
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 0 and "Traceback" not in said, said
    assert "stopped by SIGTERM" in (run / "logs" / "rank-0000.log").read_text()
    checkpoint.read(run, "--resume")


def test_what_would_fail_again_is_not_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, str(SCRIPT), *FLAGS, "--batch", "9", "--accumulation", "2", "--max-restarts", "3"]
    done = subprocess.run([*line, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 2 and "start 2" not in done.stderr and "--batch" in done.stderr, done.stderr


def test_hostfile_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two\na slots=2\n\nb slots=1 # small\n")
    assert read_hostfile(file) == {"a": 2, "b": 1}
    for text in ("a\n", "a slots=x\n", "a slots=1\na slots=1\n", "", "a slots=0\n", "a slots=²\n", "\udcff slots=1\n"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ArgumentError, match="--hostfile"):
            read_hostfile(file)
    with pytest.raises(ArgumentError, match=r"--hostfile: was .*; it may be a readable file \(.*No such file"):
        read_hostfile(tmp_path / "nothing")
    assert train.main([*FLAGS, "--max-restarts", "-1"]) == 2
    assert "--max-restarts" in capsys.readouterr().err


def test_ranks_are_told_their_hosts_in_order() -> None:
    argv = ["--local_rank=2", "--variant", "wgan", "--hosts=fe80::1:2,h2:1", "--job=1a"]
    assert rank_hosts(argv) == ["fe80::1", "fe80::1", "h2"] and rank_hosts([]) == []
    assert train.parse(argv).variant == "wgan"


class Scripted(Supervisor):
    """Each start ends as the next of `ends` says: an exit code, and whether it left a new checkpoint."""

    def __init__(self, run: Path, restarts: int, ends: list[tuple[int, bool]], hosts: dict[str, int] | None = None):
        file = None if hosts is None else run / "hosts file"
        least = None if hosts is None else 1
        super().__init__(Supervision(restarts, least, hosts or {}, file, None, []), run, True, 0)
        self.ends = ends
        self.starts: list[dict[str, int]] = []

    def _launch(self, hosts: dict[str, int], start: int) -> int:
        code, saved = self.ends[start]
        self.starts.append(hosts)
        if saved:
            made = checkpoint.folder(self._run) / f"kimg-{start:010.3f}"
            made.mkdir(parents=True)
            (made / "checkpoint.json").touch()
        return code


@pytest.fixture
def unhandled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor in this process leaves its signals alone."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


SAVED, NOTHING = (137, True), (137, False)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize(
    ("restarts", "ends", "code", "said"),
    [
        *[(3, [(code, True)], code, "") for code in (0, 1, 2)],
        (3, [NOTHING, SAVED, NOTHING, (0, True)], 0, "1 left"),
        (9, [SAVED, NOTHING, NOTHING], FAULT, "two starts in a row brought no new checkpoint"),
        (1, [SAVED, SAVED], FAULT, "no restarts are left of --max-restarts 1"),
    ],
)
def test_what_ends_it(
    restarts: int,
    ends: list[tuple[int, bool]],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").touch()
    supervisor = Scripted(tmp_path, restarts, ends)
    assert supervisor() == code
    assert len(supervisor.starts) == len(ends)
    heard = capsys.readouterr().err
    last = (heard.splitlines() or [""])[-1]
    assert said in last and bool(said) == bool(heard)
    if code == FAULT:
        assert last.endswith(f"go on with: fastgan train --max-restarts {restarts} --resume {tmp_path}")


@pytest.mark.usefixtures("unhandled")
def test_starts_on_the_hosts_that_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    hosts = {"a": 2, "b": 1}
    supervisor = Scripted(tmp_path, 0, [NOTHING], hosts)
    monkeypatch.setattr(supervisor, "_on_hosts", lambda *_: {"b": "10.0.0.2 fe80::1\n"})
    assert supervisor() == FAULT and supervisor.starts == [{"b": 1}] and supervisor._master == "10.0.0.2"
    said = capsys.readouterr().err
    assert "without a: no answer over ssh" in said
    assert f"--hostfile '{tmp_path}/hosts file' --max-restarts 0 --min-nodes 1 --resume {tmp_path}" in said


def test_what_is_asked_of_a_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hosts"
    file.write_text("a slots=2\nb slots=1\n")
    line = ["--max-restarts", "2", "--hostfile", str(file), "--seed", "1"]
    assert asked([*line, "--min-nodes", "2", "--ssh-port", "1"]) == Supervision(
        2, 2, {"a": 2, "b": 1}, file, 1, ["--seed", "1"]
    )
    assert asked(line[2:]) == Supervision(0, None, {"a": 2, "b": 1}, file, None, ["--seed", "1"])
    assert asked(["--max-restarts", "0", "--min-nodes", "1"]) == Supervision(0, 1, {}, None, None, [])
    assert asked(["--min-nodes", "1"]) is asked(["--max", "1"]) is None  # a rank's own flag may begin like one of these
    for flag, value in (
        *(("--min-nodes", "3"), ("--min-nodes", "0"), ("--ssh-port", "0"), ("--max-restarts", "x")),
        ("--max-restarts", "²"),
    ):
        with pytest.raises(ArgumentError, match=f"{flag}: was '?{value}"):
            asked([*line, flag, value])
    monkeypatch.setenv("RANK", "0")
    assert asked(line) is None
