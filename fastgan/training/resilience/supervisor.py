"""`fastgan train --max-restarts N [--hostfile H --min-nodes M]`: the launcher as a child, started again after a fault.

torchrun's and DeepSpeed's elastic agents do not serve here: they want an agent started on every host and a rendezvous
on one that never fails, and they know neither which checkpoint is good nor that accumulation keeps the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan import checkpoint
from fastgan.errors import ArgumentError
from fastgan.training.resilience.heartbeat import FAULT

SCRIPT = Path(__file__).resolve().parents[2] / "train.py"

JOB = "--job="
"""Begins an argument of the ranks that says nothing to them: by it a supervisor knows its own on a host."""

HOSTS = "--hosts="
"""Begins an argument of the ranks, `--hosts=h1:8,h2:8`: whose ranks they are, in order, before any of them has come."""


def rank_hosts(argv: Sequence[str]) -> list[str]:
    """The host of each rank as `HOSTS` says; nothing where no supervisor started this process."""
    told = [part.rpartition(":") for flag in argv if flag.startswith(HOSTS) for part in flag[len(HOSTS) :].split(",")]
    return [host for host, _, slots in told for _ in range(int(slots))]


@dataclass(frozen=True)
class Supervision:
    """What was asked of the supervisor, and `rest`, what the ranks are told."""

    restarts: int
    min_nodes: int | None
    hosts: dict[str, int]
    hostfile: Path | None
    ssh_port: int | None
    rest: list[str]


def asked(argv: list[str]) -> Supervision | None:
    """The supervision that a command line asks for; None: it asks for none, or this is one of its ranks.

    Raises:
        ArgumentError: a value that cannot be.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--max-restarts", "--min-nodes", "--hostfile", "--ssh-port"):
        parser.add_argument(flag)
    given, rest = parser.parse_known_args(argv)
    if "RANK" in os.environ or (given.max_restarts is None and given.hostfile is None):
        return None
    numbers = {}
    for name, least in (("max_restarts", 0), ("min_nodes", 1), ("ssh_port", 1)):
        text = getattr(given, name)
        if text is not None and (not text.isdecimal() or int(text) < least):
            raise ArgumentError(f"--{name.replace('_', '-')}", text, f"must be a whole number, {least} or more")
        numbers[name] = None if text is None else int(text)
    hostfile = None if given.hostfile is None else Path(given.hostfile)
    hosts = {} if hostfile is None else read_hostfile(hostfile)
    least_nodes = numbers["min_nodes"]
    if least_nodes is not None and least_nodes > max(len(hosts), 1):
        raise ArgumentError("--min-nodes", least_nodes, f"must be at most {max(len(hosts), 1)}, the hosts there are")
    return Supervision(numbers["max_restarts"] or 0, least_nodes, hosts, hostfile, numbers["ssh_port"], rest)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, as in DeepSpeed's hostfile: a line `HOST slots=N` for each.

    Raises:
        ArgumentError: it cannot be read, or has another line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("--hostfile", str(path), f"must be a readable file ({error})") from None
    hosts: dict[str, int] = {}
    for line in lines:
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[-1].removeprefix("slots=")
        if len(words) != 2 or not slots.isdecimal() or int(slots) < 1 or words[0] in hosts:
            raise ArgumentError("--hostfile", str(path), f"a line may be `HOST slots=N`, each host once, not {line!r}")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ArgumentError("--hostfile", str(path), "it may name a host or more")
    return hosts


class Supervisor:
    """One run from its first start to its end.

    Args:
        asked: see `Supervision`.
        run: the run directory; it may not exist yet.
        resume: whether the command line goes on with it already.
        timeout: of the ranks, seconds.
    """

    def __init__(self, asked: Supervision, run: Path, resume: bool, timeout: float) -> None:
        self._asked, self._run, self._resume, self._timeout = asked, run, resume, timeout
        self._signal: int | None = None
        self._urgent = False
        # What the ranks on the hosts are found by; see `JOB`.
        self._job = secrets.token_hex(8)

    def __call__(self) -> int:
        """Run to the end; the exit code is that of the last start."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` wants it
                signal.signal(number, self._receive)
        idle = 0
        for start in range(self._asked.restarts + 1):
            hosts = self._answering(start)
            if self._signal is not None:
                return self._stopped()
            if hosts is None:
                return FAULT
            before = self._newest()
            code = self._launch(hosts, start)
            if self._signal is not None:
                self._leave(hosts, code)
                return code if code in (0, 2) else self._stopped()
            if code in (0, 1, 2):
                # Done, a NaN, an error of the program's own, an argument: again would be the same again.
                return code
            idle = 0 if self._newest() != before else idle + 1
            if idle == 2:
                return self._give_up("two starts in a row brought no new checkpoint")
            if start < self._asked.restarts:
                left = self._asked.restarts - start
                self._say(f"a fault (exit code {code}); restarting from {self._newest() or 'the start'}, {left} left")
        return self._give_up(f"no restarts are left of --max-restarts {self._asked.restarts}")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read this may be gone
            print(f"fastgan: {text}", file=sys.stderr, flush=True)

    def _give_up(self, why: str) -> int:
        self._say(f"given up: {why}{self._how_to_go_on()}")
        return FAULT

    def _stopped(self) -> int:
        assert self._signal is not None
        self._say(f"stopped by {signal.Signals(self._signal).name}{self._how_to_go_on()}")
        return 128 + self._signal if self._newest() is None else 0

    def _how_to_go_on(self) -> str:
        if not (self._run / "config.yaml").is_file():
            return ""
        asked = [f"--max-restarts {self._asked.restarts}"]
        if self._asked.hostfile is not None:
            asked.insert(0, f"--hostfile {shlex.quote(str(self._asked.hostfile))}")
        for flag, value in (("--min-nodes", self._asked.min_nodes), ("--ssh-port", self._asked.ssh_port)):
            asked += [] if value is None else [f"{flag} {value}"]
        return f"; go on with: fastgan train {' '.join(asked)} --resume {shlex.quote(str(self._run))}"

    def _leave(self, hosts: dict[str, int], code: int) -> None:
        """Wait until no rank is left: a signal to every process ends the launcher before they have saved."""
        if hosts and code != 0:
            ended = (
                f"for i in $(seq {round(self._timeout)}); do pgrep -f {self._ranks()} >/dev/null || exit; sleep 1; done"
            )
            self._on_hosts(hosts, f"{ended}; pkill -KILL -f {self._ranks()}", self._timeout + 10)

    def _newest(self) -> Path | None:
        return next(iter(checkpoint.existing(self._run)[-1:]), None)

    # --- the hosts --------------------------------------------------------------------------------------------------

    def _on_hosts(self, hosts: Iterable[str], command: str, timeout: float) -> dict[str, str]:
        """What a shell command says, by host, of those where it succeeds within `timeout` seconds; on all at once."""
        port = [] if self._asked.ssh_port is None else ["-p", str(self._asked.ssh_port)]
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", *port]
        calls = {host: subprocess.Popen([*ssh, host, command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, start_new_session=True)
                 for host in hosts}  # fmt: skip
        deadline, said = time.monotonic() + timeout, {}
        for host, call in calls.items():
            try:
                text = call.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0]
                if call.returncode == 0:
                    said[host] = text
            except subprocess.TimeoutExpired:
                call.kill()
                call.communicate()
        return said

    def _ranks(self) -> str:
        """A pattern for pkill that the ranks match, and neither their launcher nor the shell that runs pkill."""
        return shlex.quote(f"[-]-local_rank=.*{JOB}{self._job}")

    def _answering(self, start: int) -> dict[str, int] | None:
        """The hosts to start on: all, or with --min-nodes those that answer; waits up to the timeout for enough."""
        hosts = self._asked.hosts
        if not hosts:
            return {}
        needed = self._asked.min_nodes or len(hosts)
        # A connection of the launcher's may have broken where the ranks' own have not: two jobs would write one run.
        ended = f"pkill -KILL -f {self._ranks()}; " if start else ""
        deadline, told = time.monotonic() + self._timeout, False
        while True:
            said = self._on_hosts(hosts, f"{ended}hostname -I || true", 10)
            found = {host: slots for host, slots in hosts.items() if host in said}
            missing = ", ".join(host for host in hosts if host not in found)
            if len(found) >= needed:
                if missing:
                    self._say(f"without {missing}: no answer over ssh")
                first = next(iter(found))
                self._master = next(iter(said[first].split()), first)
                return found
            if self._signal is not None:
                return None
            if time.monotonic() > deadline:
                self._give_up(f"no answer over ssh from {missing}, and {needed} hosts are needed")
                return None
            if not told:
                self._say(f"no answer over ssh from {missing}; trying for {self._timeout:g} s")
                told = True
            time.sleep(1)

    # --- the launcher -----------------------------------------------------------------------------------------------

    def _launch(self, hosts: dict[str, int], start: int) -> int:
        flags = list(self._asked.rest)
        if start and (self._run / "config.yaml").is_file():
            flags = ["--resume", str(self._run)]  # all flags are in the run's own configuration
        elif not self._resume and "--out" not in {flag.split("=")[0] for flag in flags}:
            flags += ["--out", str(self._run)]
        environment = dict(os.environ)
        with tempfile.TemporaryDirectory(prefix="fastgan-") as folder:
            if hosts:
                file = Path(folder) / "hosts"
                file.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
                port = [] if self._asked.ssh_port is None else ["--ssh_port", str(self._asked.ssh_port)]
                line = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(file), "--force_multi"]
                # Another port than the last start's, which may still be held by what is ending.
                line += ["--master_port", str(29500 + start % 100), *port, "--master_addr", self._master]
                flags.append(HOSTS + ",".join(f"{host}:{slots}" for host, slots in hosts.items()))
                flags.append(f"{JOB}{self._job}")
                # A connection to a host that is gone ends with it, and with that the launcher.
                alive = max(1, round(self._timeout / 4))
                kept = environment.get("PDSH_SSH_ARGS_APPEND", "")
                environment["PDSH_SSH_ARGS_APPEND"] = f"{kept} -o ServerAliveInterval={alive} -o ServerAliveCountMax=3"
            else:
                line = [sys.executable]
            argv = [*line, str(SCRIPT), *flags]
            self._say(f"start {start + 1}: {shlex.join(argv)}")
            code = self._wait(subprocess.Popen(argv, env=environment, start_new_session=True), hosts)
        return code if code >= 0 else 128 - code

    def _wait(self, child: subprocess.Popen[bytes], hosts: dict[str, int]) -> int:
        """Until the child has ended, and hand a signal on to the ranks."""
        since, told = None, 0.0
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if self._signal is None:
                    continue
            now = time.monotonic()
            since = since or now
            if self._urgent or now - since > self._timeout:
                os.killpg(child.pid, self._signal)
                self._urgent, since = False, now
            elif not hosts and not told:
                os.killpg(child.pid, self._signal)
                told = now
            elif hosts and now - told > 2:
                # The launcher would end before the ranks have saved, so it is they who are told; once more where
                # they had not started yet.
                self._on_hosts(hosts, f"pkill -TERM -f {self._ranks()}; true", 10)
                told = time.monotonic()

    def _receive(self, number: int, _: Any) -> None:
        self._urgent = self._urgent or self._signal == number == signal.SIGINT
        self._signal = number
