"""`--max-restarts`: a run that is killed is restarted, and ends like one that was not."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastgan
from fastgan import checkpoint
from fastgan.cli import train
from fastgan.errors import ArgumentError
from fastgan.training.resilience.heartbeat import EXIT_RANK_FAULT
from fastgan.training.resilience.supervisor import Supervision, Supervisor, parse_supervision, rank_hosts, read_hostfile

SCRIPT = Path(fastgan.__file__).with_name("train.py")
FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 0.8 --fade-kimg 0.2 "
    "--stable-kimg 0.4 --checkpoint-kimg 0.1 --keep 50 --samples 4 --deterministic --threads 1"
).split()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the child to kill in /proc")
def test_killed_process_is_restarted_and_ends_bit_identical(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    line = [sys.executable, str(SCRIPT), *FLAGS]
    assert subprocess.run([*line, "--out", str(whole)], stdout=subprocess.DEVNULL).returncode == 0
    supervised = subprocess.Popen([*line, "--out", str(run), "--max-restarts", "1"], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
    while len(checkpoint.existing(run)) < 3:
        assert supervised.poll() is None
        time.sleep(0.02)
    os.kill(_children(supervised.pid)[0], signal.SIGKILL)
    stderr = supervised.communicate(timeout=120)[1]
    assert supervised.returncode == 0, stderr
    assert "the ranks failed (exit code 137); restarting from" in stderr and "start 2" in stderr
    for name in ("generator.safetensors", "training.safetensors"):
        ours, theirs = (load_file(checkpoint.existing(path)[-1] / name) for path in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_generated_run_directory_of_a_refused_run_is_removed(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--max-restarts", "1", "--batch", "9", "--accumulation", "2"]
    refused = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and re.search(r"--batch.*\b9\b", refused.stderr)
    assert not list((tmp_path / "runs").iterdir())


def test_closed_output_saves_and_stops(tmp_path: Path) -> None:
    """As with `| head`, or a launcher that was killed: the run does not continue unattended, and loses nothing."""
    run = tmp_path / "run"
    line = [sys.executable, str(SCRIPT), *FLAGS, "--kimg", "1000", "--log-kimg", "0.1"]
    job = subprocess.Popen([*line, "--out", str(run)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert job.stdout is not None
    while "img/s" not in job.stdout.readline():
        assert job.poll() is None
    job.stdout.close()
    stderr = job.communicate(timeout=60)[1]
    assert job.returncode == 0 and "Traceback" not in stderr, stderr
    assert "stopped by SIGTERM" in (run / "logs" / "rank-0000.log").read_text()
    checkpoint.read(run, "--resume")


def test_invalid_argument_is_not_retried(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, str(SCRIPT), *FLAGS, "--batch", "9", "--accumulation", "2", "--max-restarts", "3"]
    done = subprocess.run([*line, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 2 and "start 2" not in done.stderr and "--batch" in done.stderr, done.stderr


def test_hostfile_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two\na slots=2\n\nb slots=1 # small\n")
    assert read_hostfile(file) == {"a": 2, "b": 1}
    for text in ("a\n", "a slots=x\n", "a slots=1\na slots=1\n", "", "a slots=0\n", "a slots=²\n", "\udcff slots=1\n"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ArgumentError, match="--hostfile"):
            read_hostfile(file)
    with pytest.raises(
        ArgumentError, match=r"--hostfile must be a readable file \(No such file or directory\), got '.*nothing'"
    ):
        read_hostfile(tmp_path / "nothing")
    assert train.main([*FLAGS, "--max-restarts", "-1"]) == 2
    assert "--max-restarts" in capsys.readouterr().err


def test_hosts_of_the_ranks_in_order() -> None:
    argv = ["--local_rank=2", "--variant", "wgan", "--hosts=fe80::1:2,h2:1", "--job=1a"]
    assert rank_hosts(argv) == ["fe80::1", "fe80::1", "h2"] and rank_hosts([]) == []
    assert train.parse(argv).variant == "wgan"


class Scripted(Supervisor):
    """Start i ends as `ends[i]`: with an exit code, and with a new checkpoint or without."""

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
    """Keep a supervisor in this process from installing signal handlers."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


SAVED, NOTHING = (137, True), (137, False)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize(
    ("restarts", "ends", "code", "message"),
    [
        *[(3, [(code, True)], code, "") for code in (0, 1, 2)],
        (3, [NOTHING, SAVED, NOTHING, (0, True)], 0, "restarts left: 1"),
        (9, [SAVED, NOTHING, NOTHING], EXIT_RANK_FAULT, "two starts in a row wrote no new checkpoint"),
        (1, [SAVED, SAVED], EXIT_RANK_FAULT, "--max-restarts 1 is used up"),
    ],
)
def test_what_ends_a_run(
    restarts: int,
    ends: list[tuple[int, bool]],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").touch()
    supervisor = Scripted(tmp_path, restarts, ends)
    assert supervisor.supervise() == code
    assert len(supervisor.starts) == len(ends)
    stderr = capsys.readouterr().err
    last = (stderr.splitlines() or [""])[-1]
    assert message in last and bool(message) == bool(stderr)
    if code == EXIT_RANK_FAULT:
        assert last.endswith(f"resume with: fastgan train --max-restarts {restarts} --resume {tmp_path}")


@pytest.mark.usefixtures("unhandled")
def test_starts_on_the_hosts_that_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    hosts = {"a": 2, "b": 1}
    supervisor = Scripted(tmp_path, 0, [NOTHING], hosts)
    monkeypatch.setattr(supervisor, "_run_on_hosts", lambda *_: {"b": "10.0.0.2 fe80::1\n"})
    assert (
        supervisor.supervise() == EXIT_RANK_FAULT
        and supervisor.starts == [{"b": 1}]
        and supervisor._master == "10.0.0.2"
    )
    stderr = capsys.readouterr().err
    assert "starting without a: no answer over ssh" in stderr
    assert f"--hostfile '{tmp_path}/hosts file' --max-restarts 0 --min-nodes 1 --resume {tmp_path}" in stderr


def test_flags_of_the_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hosts"
    file.write_text("a slots=2\nb slots=1\n")
    line = ["--max-restarts", "2", "--hostfile", str(file), "--seed", "1"]
    assert parse_supervision([*line, "--min-nodes", "2", "--ssh-port", "1"]) == Supervision(
        2, 2, {"a": 2, "b": 1}, file, 1, ["--seed", "1"]
    )
    assert parse_supervision(line[2:]) == Supervision(0, None, {"a": 2, "b": 1}, file, None, ["--seed", "1"])
    assert parse_supervision(["--max-restarts", "0", "--min-nodes", "1"]) == Supervision(0, 1, {}, None, None, [])
    assert parse_supervision(["--min-nodes", "1"]) is parse_supervision(["--max", "1"]) is None
    for flag, value in (
        *(("--min-nodes", "3"), ("--min-nodes", "0"), ("--ssh-port", "0"), ("--max-restarts", "x")),
        ("--max-restarts", "²"),
    ):
        with pytest.raises(ArgumentError, match=f"{flag} must be .*, got '?{value}"):
            parse_supervision([*line, flag, value])
    monkeypatch.setenv("RANK", "0")
    assert parse_supervision(line) is None


@pytest.mark.parametrize("ignored", [None, signal.SIGHUP])
def test_signal_that_nohup_ignores_is_not_handled(
    ignored: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == ignored else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda number, _: handled.append(number))
    assert Scripted(tmp_path, 0, [(0, True)]).supervise() == 0
    assert handled == [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if number != ignored]


class Signalled(Scripted):
    """A signal arrives while the ranks run."""

    exit_codes: list[int]

    def _launch(self, hosts: dict[str, int], start: int) -> int:
        self._receive(signal.SIGTERM, None)
        return super()._launch(hosts, start)

    def _wait_for_ranks(self, hosts: dict[str, int], code: int) -> None:
        self.exit_codes = [*getattr(self, "exit_codes", []), code]


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize(
    ("end", "code"), [((0, True), 0), ((2, False), 2), ((143, True), 0), ((143, False), 143), ((1, True), 0)]
)
def test_signal_stops_without_a_restart(
    end: tuple[int, bool], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    supervisor = Signalled(tmp_path, 3, [end])
    assert supervisor.supervise() == code
    assert len(supervisor.starts) == 1 and supervisor.exit_codes == [end[0]]
    stopped = f"fastgan: stopped by SIGTERM; resume with: fastgan train --max-restarts 3 --resume {tmp_path}\n"
    assert capsys.readouterr().err == (stopped if end[0] not in (0, 2) else "")


def test_nothing_to_resume_and_closed_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Scripted(tmp_path / "a run", 1, [])
    assert supervisor._how_to_resume() == ""
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.yaml").touch()
    assert supervisor._how_to_resume().endswith(f"--resume '{tmp_path}/a run'")

    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    assert supervisor._give_up("for a test") == EXIT_RANK_FAULT


class Child:
    """A launcher that ends with -9 after `polls` calls of `wait`, one second each."""

    pid = 77

    def __init__(self, polls: int, before: Callable[[int], None] = lambda poll: None) -> None:
        self.polls, self.before, self.now = polls, before, 0

    def wait(self, timeout: float) -> int:
        self.before(self.now)
        self.now += 1
        if self.now > self.polls:
            return -signal.SIGKILL
        raise subprocess.TimeoutExpired("train", timeout)


@pytest.mark.parametrize(
    ("signals", "killed"),
    [
        ({}, []),
        ({2: signal.SIGTERM}, [3, 9, 15]),  # and after each further timeout, 5 s
        ({2: signal.SIGINT, 4: signal.SIGINT}, [3, 5, 11, 17]),  # the second one immediately
        ({2: signal.SIGTERM, 4: signal.SIGINT}, [3, 9, 15]),
    ],
)
def test_signal_is_passed_on(
    signals: dict[int, int], killed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor(Supervision(0, None, {}, None, None, []), tmp_path, False, 5)
    child = Child(18, lambda poll: supervisor._receive(signals[poll], None) if poll in signals else None)
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(time, "monotonic", lambda: float(child.now))
    monkeypatch.setattr(os, "killpg", lambda pid, number: seen.append((child.now, pid, number)))
    assert supervisor._wait_for_launcher(child, {}) == -signal.SIGKILL  # type: ignore[arg-type]
    assert [when for when, _, _ in seen] == killed and {pid for _, pid, _ in seen} <= {77}
    assert [number for _, _, number in seen][-1:] == list(signals.values())[-1:]


def test_signal_is_sent_to_the_ranks_on_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher would end before the ranks have saved."""
    supervisor = Supervisor(Supervision(0, None, {"a": 1}, None, None, []), tmp_path, False, 100)
    child = Child(9)
    calls: list[tuple[int, list[str], str]] = []
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + child.now)
    monkeypatch.setattr(supervisor, "_run_on_hosts", lambda hosts, line, _: calls.append((child.now, [*hosts], line)))
    supervisor._receive(signal.SIGTERM, None)
    assert supervisor._wait_for_launcher(child, {"a": 1}) == -signal.SIGKILL  # type: ignore[arg-type]
    assert [when for when, _, _ in calls] == [1, 4, 7]
    assert calls[0][1:] == (["a"], f"pkill -TERM -f {supervisor._rank_pattern()}; true")
    calls.clear()
    supervisor._wait_for_ranks({"a": 1}, 0)
    supervisor._wait_for_ranks({}, 1)
    assert not calls
    supervisor._wait_for_ranks({"a": 1}, 143)
    assert calls[0][2].startswith("for i in $(seq 100); do pgrep -f ")
    assert calls[0][2].endswith(f"pkill -KILL -f {supervisor._rank_pattern()}")


def test_pattern_matches_only_ranks_of_the_job(tmp_path: Path) -> None:
    supervisor, other = (Supervisor(Supervision(0, None, {}, None, None, []), tmp_path, False, 1) for _ in range(2))
    (pattern,) = shlex.split(supervisor._rank_pattern())
    rank = f"python train.py --local_rank=0 --variant gan --hosts=a:1 --job={supervisor._job}"
    assert re.search(pattern, rank) and not re.search(pattern, rank.replace(supervisor._job, other._job))
    for shell in (
        f"sh -c pkill -f {supervisor._rank_pattern()}",
        f"python -m deepspeed.launcher --job={supervisor._job}",
    ):
        assert not re.search(pattern, shell)


class Launched:
    """Replaces Popen and records its calls."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []
        self.hostfile = ""
        self.environment: dict[str, str] = {}

    def __call__(self, argv: list[str], *, env: dict[str, str], start_new_session: bool) -> Child:
        assert start_new_session  # a terminal's signal is passed on, not shared
        self.lines.append(argv)
        self.environment = env
        if "--hostfile" in argv:
            self.hostfile = Path(argv[argv.index("--hostfile") + 1]).read_text()
        return Child(0)


def test_command_line_on_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Launched()
    monkeypatch.setattr(subprocess, "Popen", launched)

    def flags(rest: list[str], resume: bool, start: int) -> list[str]:
        supervisor = Supervisor(Supervision(1, None, {}, None, None, rest), tmp_path, resume, 5)
        assert supervisor._launch({}, start) == 128 + signal.SIGKILL
        assert launched.lines[-1][:2] == [sys.executable, str(SCRIPT)]
        return launched.lines[-1][2:]

    out = str(tmp_path)
    assert flags(["--seed", "1"], False, 0) == ["--seed", "1", "--out", out] == flags(["--seed", "1"], False, 1)
    for given in (["--out", out], [f"--out={out}"]):
        assert flags(given, False, 0) == given
    assert flags(["--resume", out], True, 0) == ["--resume", out]
    (tmp_path / "config.yaml").touch()
    assert flags(["--seed", "1"], False, 0) == ["--seed", "1", "--out", out]
    assert flags(["--seed", "1"], False, 1) == ["--resume", out]


def test_command_line_on_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Launched()
    monkeypatch.setattr(subprocess, "Popen", launched)
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-4")
    supervisor = Supervisor(
        Supervision(1, None, {"a": 2, "b": 1}, Path("h"), 2222, ["--seed", "1"]), tmp_path, False, 2
    )
    supervisor._master = "10.0.0.2"
    ports = []
    for start in (0, 1):
        supervisor._launch({"b": 1, "c": 4}, start)
        line = shlex.join(launched.lines[-1])
        assert launched.hostfile == "b slots=1\nc slots=4\n"
        assert "-m deepspeed.launcher.runner" in line and "--ssh_port 2222 --master_addr 10.0.0.2" in line
        assert line.endswith(f"--seed 1 --out {tmp_path} --hosts=b:1,c:4 --job={supervisor._job}")
        ports.append(launched.lines[-1][launched.lines[-1].index("--master_port") + 1])
    assert ports[0] != ports[1]  # the last start may still hold its port
    alive = "-4 -o ServerAliveInterval=1 -o ServerAliveCountMax=3"
    assert launched.environment["PDSH_SSH_ARGS_APPEND"] == alive


def test_output_of_commands_on_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []

    class Ssh:
        def __init__(self, argv: list[str], **_: object) -> None:
            assert argv[0] == "ssh" and argv[-4:-2] == ["-p", "2222"] and argv[-1] == "hostname"
            self.host = argv[-2]
            self.returncode = 255 if self.host == "refused" else 0

        def communicate(self, timeout: float | None = None) -> tuple[str, None]:
            if self.host == "silent" and self.host not in killed:
                raise subprocess.TimeoutExpired("ssh", timeout or 0)
            return f"{self.host} here\n", None

        def kill(self) -> None:
            killed.append(self.host)

    monkeypatch.setattr(subprocess, "Popen", Ssh)
    supervisor = Supervisor(Supervision(0, None, {}, None, 2222, []), tmp_path, False, 5)
    assert supervisor._run_on_hosts(["a", "silent", "refused", "b"], "hostname", 1) == {
        "a": "a here\n",
        "b": "b here\n",
    }
    assert killed == ["silent"]


def test_hosts_that_do_not_answer_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts, now, lines = {"a": 2, "b": 1}, [0.0], []
    supervisor = Supervisor(Supervision(1, None, hosts, Path("h"), None, []), tmp_path, False, 3)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def answer(hosts: dict[str, int], line: str, timeout: float) -> dict[str, str]:
        lines.append(line)
        return {host: "\n" for host in hosts if host == "a" or now[0] >= late}

    monkeypatch.setattr(supervisor, "_run_on_hosts", answer)
    late = 2.0
    assert supervisor._reachable_hosts(0) == hosts and supervisor._master == "a"  # the host printed no address
    assert capsys.readouterr().err.count("no answer over ssh from b; retrying for 3 s") == 1
    assert {line.partition("hostname")[0] for line in lines} == {""}
    lines.clear()
    supervisor._reachable_hosts(1)  # ranks left by the last start would write the same run
    assert lines[0].startswith(f"pkill -KILL -f {supervisor._rank_pattern()}; ")
    late = 100.0
    assert supervisor._reachable_hosts(0) is None and now[0] < 10
    assert "giving up: no answer over ssh from b, and 2 hosts are needed" in capsys.readouterr().err
    supervisor._receive(signal.SIGTERM, None)
    before = now[0]
    assert supervisor._reachable_hosts(0) is None and now[0] == before and not capsys.readouterr().err
