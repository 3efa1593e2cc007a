"""`fastgan train --max-restarts N [--hostfile H --min-nodes M]`: restarts a run from its last checkpoint after a fault.

The supervisor starts the ranks as a child process: DeepSpeed's launcher with --hostfile, else one training process. It
restarts them if they end with a fault, and not after an error that a restart would repeat. docs/cluster.md explains why
it does not build on torchrun's elastic agent.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
from fastgan.training.resilience.heartbeat import EXIT_RANK_FAULT

SCRIPT = Path(__file__).resolve().parents[2] / "train.py"

JOB_FLAG = "--job="
"""Flag of the ranks that they ignore: a supervisor finds its own ranks on a host by it."""

HOSTS_FLAG = "--hosts="
"""Flag of the ranks, `--hosts=h1:8,h2:8`: the hosts of the ranks in order, known before any rank has connected."""


def rank_hosts(argv: Sequence[str]) -> list[str]:
    """The host of each rank by `HOSTS_FLAG`; empty if no supervisor started this process."""
    entries = [
        entry.rpartition(":")
        for flag in argv
        if flag.startswith(HOSTS_FLAG)
        for entry in flag[len(HOSTS_FLAG) :].split(",")
    ]
    return [host for host, _, slots in entries for _ in range(int(slots))]


@dataclass(frozen=True)
class Supervision:
    """The flags of the supervisor.

    Attributes:
        restarts: --max-restarts.
        min_nodes: --min-nodes; None: all hosts are needed.
        hosts: slots by host; empty without --hostfile.
        hostfile: --hostfile.
        ssh_port: --ssh-port; None: ssh's own default.
        rank_flags: all other flags, which the ranks get.
    """

    restarts: int
    min_nodes: int | None
    hosts: dict[str, int]
    hostfile: Path | None
    ssh_port: int | None
    rank_flags: list[str]


def parse_supervision(argv: list[str]) -> Supervision | None:
    """The supervisor's flags in a command line; None if it has none, or if this process is one of the ranks.

    Raises:
        ArgumentError: a flag has an invalid value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--max-restarts", "--min-nodes", "--hostfile", "--ssh-port"):
        parser.add_argument(flag)
    given, rank_flags = parser.parse_known_args(argv)
    if "RANK" in os.environ or (given.max_restarts is None and given.hostfile is None):
        return None
    numbers = {}
    for name, least in (("max_restarts", 0), ("min_nodes", 1), ("ssh_port", 1)):
        text = getattr(given, name)
        if text is not None and (not text.isdecimal() or int(text) < least):
            raise ArgumentError(f"--{name.replace('_', '-')}", text, f"must be a whole number of at least {least}")
        numbers[name] = None if text is None else int(text)
    hostfile = None if given.hostfile is None else Path(given.hostfile)
    if hostfile is not None and importlib.util.find_spec("deepspeed") is None:
        raise ArgumentError("--hostfile", given.hostfile, "it needs DeepSpeed: pip install 'fastgan[train]'")
    hosts = {} if hostfile is None else read_hostfile(hostfile)
    min_nodes = numbers["min_nodes"]
    if min_nodes is not None and min_nodes > max(len(hosts), 1):
        raise ArgumentError("--min-nodes", min_nodes, f"must be at most {max(len(hosts), 1)}, the number of hosts")
    return Supervision(numbers["max_restarts"] or 0, min_nodes, hosts, hostfile, numbers["ssh_port"], rank_flags)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, from a hostfile of DeepSpeed's format: one line `HOST slots=N` for each host.

    Raises:
        ArgumentError: the file cannot be read or has another format.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentError("--hostfile", str(path), f"must be a readable file ({reason})") from None
    hosts: dict[str, int] = {}
    for line in lines:
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = words[-1].removeprefix("slots=")
        if len(words) != 2 or not slots.isdecimal() or int(slots) < 1 or words[0] in hosts:
            raise ArgumentError(
                "--hostfile", str(path), f"each line must be `HOST slots=N`, each host once, and one is {line!r}"
            )
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ArgumentError("--hostfile", str(path), "it names no host")
    return hosts


class Supervisor:
    """Runs a training to its end, over restarts.

    Args:
        flags: of the supervisor.
        run: the run directory, which need not exist yet.
        resume: whether the command line already resumes it.
        timeout: --timeout of the ranks, in seconds.
    """

    def __init__(self, flags: Supervision, run: Path, resume: bool, timeout: float) -> None:
        self._flags, self._run, self._resume, self._timeout = flags, run, resume, timeout
        self._signal: int | None = None
        self._immediately = False
        self._job = secrets.token_hex(8)

    def supervise(self) -> int:
        """Run to the end.

        Returns:
            Exit code: of the last start, `EXIT_RANK_FAULT` if there are no more restarts, or of a stop by a signal.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, self._receive)
        without_progress = 0
        for start in range(self._flags.restarts + 1):
            hosts = self._reachable_hosts(start)
            if self._signal is not None:
                return self._stopped()
            if hosts is None:
                return EXIT_RANK_FAULT
            before = self._last_checkpoint()
            code = self._launch(hosts, start)
            if self._signal is not None:
                self._wait_for_ranks(hosts, code)
                return code if code in (0, 2) else self._stopped()
            if code in (0, 1, 2):
                # Finished; or a NaN, an error of the program, an invalid argument, which a restart would repeat.
                return code
            without_progress = 0 if self._last_checkpoint() != before else without_progress + 1
            if without_progress == 2:
                return self._give_up("two starts in a row wrote no new checkpoint")
            if start < self._flags.restarts:
                self._print(
                    f"the ranks failed (exit code {code}); restarting from {self._last_checkpoint() or 'the start'}, "
                    f"restarts left: {self._flags.restarts - start}"
                )
        return self._give_up(f"--max-restarts {self._flags.restarts} is used up")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the reader may have closed stderr
            print(f"fastgan: {text}", file=sys.stderr, flush=True)

    def _give_up(self, why: str) -> int:
        self._print(f"giving up: {why}{self._how_to_resume()}")
        return EXIT_RANK_FAULT

    def _stopped(self) -> int:
        assert self._signal is not None
        self._print(f"stopped by {signal.Signals(self._signal).name}{self._how_to_resume()}")
        return 128 + self._signal if self._last_checkpoint() is None else 0

    def _how_to_resume(self) -> str:
        if not (self._run / "config.yaml").is_file():
            return ""
        words = [f"--max-restarts {self._flags.restarts}"]
        if self._flags.hostfile is not None:
            words.insert(0, f"--hostfile {shlex.quote(str(self._flags.hostfile))}")
        for flag, value in (("--min-nodes", self._flags.min_nodes), ("--ssh-port", self._flags.ssh_port)):
            words += [] if value is None else [f"{flag} {value}"]
        return f"; resume with: fastgan train {' '.join(words)} --resume {shlex.quote(str(self._run))}"

    def _last_checkpoint(self) -> Path | None:
        return next(iter(checkpoint.existing(self._run)[-1:]), None)

    # --- the hosts --------------------------------------------------------------------------------------------------

    def _run_on_hosts(self, hosts: Iterable[str], command: str, timeout: float) -> dict[str, str]:
        """Run a shell command on all hosts at once.

        Returns:
            The output by host, of the hosts where the command succeeded within `timeout` seconds.
        """
        port = [] if self._flags.ssh_port is None else ["-p", str(self._flags.ssh_port)]
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", *port]
        calls = {host: subprocess.Popen([*ssh, host, command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, start_new_session=True)
                 for host in hosts}  # fmt: skip
        deadline, outputs = time.monotonic() + timeout, {}
        for host, call in calls.items():
            try:
                text = call.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0]
                if call.returncode == 0:
                    outputs[host] = text
            except subprocess.TimeoutExpired:
                call.kill()
                call.communicate()
        return outputs

    def _rank_pattern(self) -> str:
        """A quoted pattern for pkill that matches the ranks, but neither their launcher nor the shell of pkill."""
        return shlex.quote(f"[-]-local_rank=.*{JOB_FLAG}{self._job}")

    def _reachable_hosts(self, start: int) -> dict[str, int] | None:
        """The hosts to start on: all, or with --min-nodes those that answer; None if too few answer in time."""
        hosts = self._flags.hosts
        if not hosts:
            return {}
        needed = self._flags.min_nodes or len(hosts)
        # Ranks of the last start may be left where the launcher's connection broke: two jobs would write one run.
        kill = f"pkill -KILL -f {self._rank_pattern()}; " if start else ""
        deadline, warned = time.monotonic() + self._timeout, False
        while True:
            addresses = self._run_on_hosts(hosts, f"{kill}hostname -I || true", 10)
            reachable = {host: slots for host, slots in hosts.items() if host in addresses}
            missing = ", ".join(host for host in hosts if host not in reachable)
            if len(reachable) >= needed:
                if missing:
                    self._print(f"starting without {missing}: no answer over ssh")
                first = next(iter(reachable))
                self._master = next(iter(addresses[first].split()), first)
                return reachable
            if self._signal is not None:
                return None
            if time.monotonic() > deadline:
                self._give_up(f"no answer over ssh from {missing}, and {needed} hosts are needed")
                return None
            if not warned:
                self._print(f"no answer over ssh from {missing}; retrying for {self._timeout:g} s")
                warned = True
            time.sleep(1)

    def _wait_for_ranks(self, hosts: dict[str, int], code: int) -> None:
        """Wait until the ranks on the hosts have saved: a signal to all processes ends their launcher before that."""
        if hosts and code != 0:
            ranks = self._rank_pattern()
            wait = f"for i in $(seq {round(self._timeout)}); do pgrep -f {ranks} >/dev/null || exit; sleep 1; done"
            self._run_on_hosts(hosts, f"{wait}; pkill -KILL -f {ranks}", self._timeout + 10)

    # --- the launcher -----------------------------------------------------------------------------------------------

    def _launch(self, hosts: dict[str, int], start: int) -> int:
        """Start the ranks and wait for their end; returns the exit code, 128 + N for signal N."""
        flags = list(self._flags.rank_flags)
        if start and (self._run / "config.yaml").is_file():
            flags = ["--resume", str(self._run)]  # the run's own configuration has all flags
        elif not self._resume and "--out" not in {flag.split("=")[0] for flag in flags}:
            flags += ["--out", str(self._run)]
        environment = dict(os.environ)
        with tempfile.TemporaryDirectory(prefix="fastgan-") as folder:
            line = [sys.executable]
            if hosts:
                file = Path(folder) / "hosts"
                file.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
                port = [] if self._flags.ssh_port is None else ["--ssh_port", str(self._flags.ssh_port)]
                line += ["-m", "deepspeed.launcher.runner", "--hostfile", str(file), "--force_multi"]
                # Not the port of the last start, which a rank that is still ending may hold.
                line += ["--master_port", str(29500 + start % 100), *port, "--master_addr", self._master]
                flags.append(HOSTS_FLAG + ",".join(f"{host}:{slots}" for host, slots in hosts.items()))
                flags.append(f"{JOB_FLAG}{self._job}")
                # Ends the connection to a lost host, and so the launcher.
                interval = max(1, round(self._timeout / 4))
                options = f"-o ServerAliveInterval={interval} -o ServerAliveCountMax=3"
                environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {options}"
            argv = [*line, str(SCRIPT), *flags]
            self._print(f"start {start + 1}: {shlex.join(argv)}")
            code = self._wait_for_launcher(subprocess.Popen(argv, env=environment, start_new_session=True), hosts)
        return code if code >= 0 else 128 - code

    def _wait_for_launcher(self, child: subprocess.Popen[bytes], hosts: dict[str, int]) -> int:
        """Wait for the end of the child, and pass a signal on to the ranks."""
        since, passed_on = None, 0.0
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if self._signal is None:
                    continue
            now = time.monotonic()
            since = since or now
            if self._immediately or now - since > self._timeout:
                os.killpg(child.pid, self._signal)
                self._immediately, since = False, now
            elif not hosts and not passed_on:
                os.killpg(child.pid, self._signal)
                passed_on = now
            elif hosts and now - passed_on > 2:
                # To the ranks, not to the launcher, which would end before they have saved. Repeated for ranks that
                # had not started yet.
                self._run_on_hosts(hosts, f"pkill -TERM -f {self._rank_pattern()}; true", 10)
                passed_on = time.monotonic()

    def _receive(self, number: int, _: Any) -> None:
        self._immediately = self._immediately or self._signal == number == signal.SIGINT
        self._signal = number
