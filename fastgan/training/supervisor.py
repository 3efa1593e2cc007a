"""`fastgan train --max-restarts N [--hostfile H --min-nodes M]`: the launcher as a child, started again after a fault.

torchrun's and DeepSpeed's elastic agents do not serve here: they want an agent started on every host and a rendezvous
on one that never fails, and they know neither which checkpoint is good nor that accumulation keeps the batch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan import checkpoint
from fastgan.errors import ArgumentError
from fastgan.training.liveness import FAULT

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Supervision:
    """What was asked of the supervisor, and `rest`, what the ranks are told."""

    restarts: int
    min_nodes: int | None
    hosts: dict[str, int]
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
        if text is not None and (not text.isdigit() or int(text) < least):
            raise ArgumentError(f"--{name.replace('_', '-')}", text, f"it may be a whole number, {least} or more")
        numbers[name] = None if text is None else int(text)
    hosts = {} if given.hostfile is None else read_hostfile(Path(given.hostfile))
    least_nodes = numbers["min_nodes"]
    if least_nodes is not None and least_nodes > max(len(hosts), 1):
        raise ArgumentError("--min-nodes", least_nodes, f"it may be at most {max(len(hosts), 1)}, the hosts there are")
    return Supervision(numbers["max_restarts"] or 0, least_nodes, hosts, numbers["ssh_port"], rest)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, as in DeepSpeed's hostfile: a line `HOST slots=N` for each.

    Raises:
        ArgumentError: it cannot be read, or has another line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("--hostfile", str(path), f"it may be a readable file ({error})") from None
    hosts: dict[str, int] = {}
    for line in lines:
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].removeprefix("slots=").isdigit() or words[0] in hosts:
            raise ArgumentError("--hostfile", str(path), f"a line may be `HOST slots=N`, each host once, not {line!r}")
        hosts[words[0]] = int(words[1].removeprefix("slots="))
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
        self._child: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None

    def __call__(self) -> int:
        """Run to the end; the exit code is that of the last start."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)
        idle = 0
        for start in range(self._asked.restarts + 1):
            hosts = self._answering()
            if hosts is None:
                return self._give_up("too few hosts answer")
            before = self._newest()
            code = self._launch(hosts, start)
            if self._signal is not None or code in (0, 1, 2):
                # Done, stopped, a bad argument, a NaN or an error of the program's own: again would be the same again.
                return 0 if self._signal is not None and self._newest() is not None else code
            idle = 0 if self._newest() != before else idle + 1
            if idle == 2:
                return self._give_up("two starts in a row brought no new checkpoint")
            if start < self._asked.restarts:
                left = self._asked.restarts - start
                self._say(f"a fault (exit code {code}); restarting from {self._newest() or 'the start'}, {left} left")
        return self._give_up(f"no restarts are left of --max-restarts {self._asked.restarts}")

    def _say(self, text: str) -> None:
        print(f"fastgan: {text}", file=sys.stderr, flush=True)

    def _give_up(self, why: str) -> int:
        self._say(f"given up: {why}; go on with: fastgan train --resume {self._run}")
        return FAULT

    def _newest(self) -> Path | None:
        return next(iter(checkpoint.existing(self._run)[-1:]), None)

    def _ssh(self) -> list[str]:
        port = [] if self._asked.ssh_port is None else ["-p", str(self._asked.ssh_port)]
        return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", *port]

    def _answering(self) -> dict[str, int] | None:
        """The hosts to start on: all, or with --min-nodes those that answer; waits up to the timeout for enough."""
        hosts = self._asked.hosts
        if not hosts:
            return {}
        needed = self._asked.min_nodes or len(hosts)
        deadline = time.monotonic() + self._timeout
        while True:
            probes = {host: subprocess.Popen([*self._ssh(), host, "true"], stdin=subprocess.DEVNULL,
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                      for host in hosts}  # fmt: skip
            found = {}
            for host, probe in probes.items():
                try:
                    if probe.wait(timeout=10) == 0:
                        found[host] = hosts[host]
                except subprocess.TimeoutExpired:
                    probe.kill()
                    probe.wait()
            if len(found) >= needed:
                if len(found) < len(hosts):
                    self._say(f"without {', '.join(host for host in hosts if host not in found)}, which do not answer")
                return found
            if time.monotonic() > deadline or self._signal is not None:
                return None
            time.sleep(1)

    def _launch(self, hosts: dict[str, int], start: int) -> int:
        flags = list(self._asked.rest)
        if start and (self._run / "config.yaml").is_file():
            flags = ["--resume", str(self._run)]  # all flags are in the run's own configuration
        elif not self._resume and "--out" not in {flag.split("=")[0] for flag in flags}:
            flags += ["--out", str(self._run)]
        environment = dict(os.environ)
        if hosts:
            file = self._hostfile(hosts)
            port = [] if self._asked.ssh_port is None else ["--ssh_port", str(self._asked.ssh_port)]
            line = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(file), "--force_multi"]
            # Another port than the last start's, which may still be held by what is ending.
            line += ["--master_port", str(29500 + start % 100), *port]
            line += ["--master_addr", self._address(next(iter(hosts)))]
            # A connection to a host that is gone ends with it, and with that the launcher.
            alive = max(1, round(self._timeout / 4))
            kept = environment.get("PDSH_SSH_ARGS_APPEND", "")
            environment["PDSH_SSH_ARGS_APPEND"] = f"{kept} -o ServerAliveInterval={alive} -o ServerAliveCountMax=3"
        else:
            line = [sys.executable]
        argv = [*line, str(SCRIPT), *flags]
        self._say(f"start {start + 1}: {shlex.join(argv)}")
        self._child = subprocess.Popen(argv, env=environment, start_new_session=True)
        code = self._child.wait()
        self._child = None
        return code if code >= 0 else 128 - code

    def _address(self, host: str) -> str:
        found = subprocess.run([*self._ssh(), host, "hostname -I"], capture_output=True, text=True).stdout.split()
        return found[0] if found else host

    def _hostfile(self, hosts: dict[str, int]) -> Path:
        file = self._run.with_name(f".{self._run.name}.hosts")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.part")
        partial.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
        os.replace(partial, file)
        return file

    def _pass_on(self, number: int, _: Any) -> None:
        self._signal = number
        if self._child is not None:
            os.killpg(self._child.pid, number)
