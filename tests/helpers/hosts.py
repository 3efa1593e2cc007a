"""Simulated hosts on one machine: network namespaces with their own addresses, names, processes and ssh server.

    with Hosts(2, tmp_path) as hosts:
        hosts.deepspeed("fastgan/train.py", "--variant", "pggan").wait()

Host i (from 0) is `h{i+1}` at 10.231.0.{i+1}. Its eth0 is on a bridge in another namespace, so the machine's own
network is not touched and several `Hosts` can exist at once. Each host has its own process tree: killing its first
process kills the host, and `pkill` on it does not reach beyond it. All hosts share the files.

Needs root, Linux, and Debian's iproute2, openssh-server and pdsh; `missing()` returns what is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SSH_PORT = 2222
_PREFIX = "fastgan-test"
_TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
# Debian installs sshd in a folder that a user's PATH may lack.
_PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def _tool(name: str) -> str:
    path = shutil.which(name, path=_PATH)
    assert path is not None, name
    return path


def _call(*argv: str) -> str:
    done = subprocess.run([_tool(argv[0]), *argv[1:]], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def missing() -> str | None:
    """Why there can be no simulated hosts here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool, path=_PATH) is None})
    if absent:
        return f"not installed: {', '.join(absent)}"
    name = f"{_owner(os.getpid())}-try"
    try:
        _call("ip", "netns", "add", name)
        try:
            _call("ip", "-n", name, "link", "add", "name", "a", "type", "veth", "peer", "name", "b")
            _call("ip", "-n", name, "link", "add", "name", "lan", "type", "bridge")
        finally:
            _call("ip", "netns", "del", name)
    except RuntimeError as error:
        return f"no network namespaces: {error}"
    return None


def _owner(pid: int) -> str:
    """Prefix of a process's namespaces: its number and start time, because process numbers are reused."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{_PREFIX}-{pid}-{started}"


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"{_PREFIX}-*")) if folder.is_dir() else []


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _call("ip", "netns", "pids", namespace).split()]


def _remove(namespace: str) -> None:
    """Kill the processes of a namespace and delete it with its links."""
    deadline = time.monotonic() + 10
    while (pids := _pids(namespace)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    _call("ip", "netns", "del", namespace)


def sweep() -> None:
    """Remove the namespaces and mounts of killed test processes."""
    for namespace in _namespaces():
        pid = int(namespace.removeprefix(f"{_PREFIX}-").split("-")[0])
        if not Path(f"/proc/{pid}").exists() or not namespace.startswith(f"{_owner(pid)}-"):
            with contextlib.suppress(RuntimeError):
                _remove(namespace)
    for line in Path("/proc/mounts").read_text().splitlines():
        device, mounted, *_ = line.split()
        if device.startswith(f"{_PREFIX}-"):
            pid = int(device.removeprefix(f"{_PREFIX}-").split("-")[0])
            if not Path(f"/proc/{pid}").exists() or not device.startswith(f"{_owner(pid)}-"):
                subprocess.run([_tool("umount"), "--lazy", mounted], check=False)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Hosts:
    """`count` hosts; a context manager that removes them.

    Args:
        count: number of hosts.
        folder: of their shared files.
        slots: ranks of each host in the hostfile.
        disk_mb: size of `disk`; None: there is none.

    Attributes:
        names: h1, h2, ...
        addresses: 10.231.0.1, ...
        hostfile: in DeepSpeed's format.
        environment: of the processes that `run` starts.
        own: additional variables of each host, from its next `boot` on.
        disk: a shared file system of limited size.
    """

    _made = 0

    def __init__(self, count: int, folder: Path, slots: int = 1, disk_mb: int | None = None) -> None:
        sweep()
        Hosts._made += 1
        self._prefix = f"{_owner(os.getpid())}-{Hosts._made}"
        self._switch = f"{self._prefix}-switch"
        self.count = count
        self.names = [f"h{i + 1}" for i in range(count)]
        self.addresses = [f"10.231.0.{i + 1}" for i in range(count)]
        self.home = folder / "home"
        self.hostfile = self.write_hostfile(folder / "hostfile", range(count), slots)
        self.disk = folder / "disk"
        self.own: list[dict[str, str]] = [{} for _ in range(count)]
        self._inits: list[subprocess.Popen[bytes] | None] = [None] * count
        self._relays: dict[int, subprocess.Popen[bytes]] = {}
        self._jobs: list[subprocess.Popen[str]] = []
        # Keeps the user's compiled kernels: with a new home they would be compiled again.
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        passed = {
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": cache,
        }
        self._write_home(passed)
        kept = {key: os.environ[key] for key in ("LANG", "LC_ALL", "TMPDIR") if key in os.environ}
        path = f"{Path(sys.executable).parent}:{_PATH}"
        self.environment = {**kept, **passed, "HOME": str(self.home), "PATH": path}
        try:
            if disk_mb is not None:
                self.disk.mkdir()
                _call("mount", "-t", "tmpfs", "-o", f"size={disk_mb}m", f"{self._prefix}-disk", str(self.disk))
            _call("ip", "netns", "add", self._switch)
            self._ip(None, "link", "add", "name", "lan", "type", "bridge")
            self._ip(None, "link", "set", "lan", "up")
            for i in range(count):
                self._connect(i)
            for i in range(count):
                self.boot(i)
        except BaseException:
            self.close()
            raise

    # --- start and removal -------------------------------------------------------------------------------------

    def write_hostfile(self, path: Path, hosts: Any, slots: int = 1) -> Path:
        path.write_text("".join(f"{self.names[i]} slots={slots}\n" for i in hosts))
        return path

    def _write_home(self, passed: dict[str, str]) -> None:
        ssh = self.home / ".ssh"
        ssh.mkdir(parents=True)
        for name in ("id", "host"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name))
        (self.home / "etc-hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}\n" for address, name in zip(self.addresses, self.names, strict=True))
        )
        # DeepSpeed and pdsh call plain `ssh`, which reads its configuration from the home in passwd, not from $HOME.
        options = (
            f"-F none -i {ssh / 'id'} -p {SSH_PORT} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            "-o LogLevel=ERROR -o ConnectTimeout=5"
        )
        tools = self.home / "bin"
        tools.mkdir()
        (tools / "ssh").write_text(f'#!/bin/sh\nexec {_tool("ssh")} {options} "$@"\n')
        (tools / "ssh").chmod(0o755)
        (self.home / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in passed.items()))
        settings = {
            "Port": SSH_PORT,
            "HostKey": ssh / "host",
            "AuthorizedKeysFile": ssh / "id.pub",
            "StrictModes": "no",
            "UsePAM": "no",
            "UseDNS": "no",
            "PermitRootLogin": "yes",
            "MaxStartups": "100",
            "PidFile": "none",
            "PrintMotd": "no",
        }
        (ssh / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))

    def _namespace(self, host: int | None) -> str:
        return self._switch if host is None else f"{self._prefix}-{self.names[host]}"

    def _ip(self, host: int | None, *argv: str) -> str:
        return _call("ip", "-n", self._namespace(host), *argv)

    def _connect(self, i: int) -> None:
        _call("ip", "netns", "add", self._namespace(i))
        self._ip(
            None, "link", "add", "name", f"s{i}", "type", "veth", "peer", "name", "eth0", "netns", self._namespace(i)
        )
        self._ip(None, "link", "set", f"s{i}", "master", "lan", "up")
        self._ip(i, "address", "add", f"{self.addresses[i]}/24", "dev", "eth0")
        self._ip(i, "link", "set", "eth0", "up")
        self._ip(i, "link", "set", "lo", "up")

    def boot(self, host: int) -> None:
        """Start a host's first process, the ssh server; also after `crash`."""
        Path("/run/sshd").mkdir(exist_ok=True)
        variables = " ".join(f"{key}={value}" for key, value in {"HOME": self.home, **self.own[host]}.items())
        sshd = f"{_tool('sshd')} -D -e -f {self.home}/.ssh/sshd_config -o 'SetEnv {variables}'"
        started = f"hostname {self.names[host]}; mount --bind {self.home}/etc-hosts /etc/hosts; exec {sshd}"
        argv = [_tool("ip"), "netns", "exec", self._namespace(host), _tool("unshare")]
        argv += ["--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "sh", "-c", started]
        with (self.home / f"{self.names[host]}.log").open("ab") as log:
            init = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        self._inits[host] = init
        deadline = time.monotonic() + 20
        listening = ["ss", "-Hltn", f"sport = :{SSH_PORT}"]
        while not _call("ip", "netns", "exec", self._namespace(host), *listening).strip():
            if init.poll() is not None or time.monotonic() > deadline:
                log_text = (self.home / f"{self.names[host]}.log").read_text()
                raise RuntimeError(f"sshd of {self.names[host]} does not start: {log_text}")
            time.sleep(0.02)

    def _first(self, host: int) -> int:
        """The process with number 1 on the host."""
        init = self._inits[host]
        assert init is not None, f"{self.names[host]} is not running"
        return int(Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()[0])

    def crash(self, host: int) -> None:
        """Kill every process of a host with SIGKILL."""
        init = self._inits[host]
        if init is not None:
            init.kill()
            init.wait()
            self._inits[host] = None

    def replace(self, host: int, path: Path, other: Path) -> None:
        """Show this host `other` at `path` until it crashes; both are files, or both folders."""
        _call("nsenter", "--target", str(self._first(host)), "--mount", "mount", "--bind", str(other), str(path))

    def close(self) -> None:
        for relay in self._relays.values():
            relay.kill()
            relay.wait()
        for host in range(self.count):
            self.crash(host)
        for namespace in _namespaces():
            if namespace.startswith(f"{self._prefix}-"):
                _remove(namespace)
        for job in self._jobs:
            if job.poll() is None:
                job.kill()
            job.wait()
            if job.stdout is not None:
                job.stdout.close()
        if os.path.ismount(self.disk):
            _call("umount", "--lazy", str(self.disk))

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- work -------------------------------------------------------------------------------------------------------

    def run(self, host: int, argv: list[str], **environment: str) -> subprocess.Popen[str]:
        """Start a process on a host, in its own session (see `send`), with stdout and stderr as one text stream."""
        target = [_tool("nsenter"), "--target", str(self._first(host)), "--mount", "--uts", "--net", "--pid"]
        full = {**self.environment, **self.own[host], **environment}
        full["PATH"] = f"{self.home}/bin:{full['PATH']}"
        job = subprocess.Popen([*target, "--", *argv], env=full, cwd=self.home, text=True, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        self._jobs.append(job)
        return job

    @staticmethod
    def send(job: subprocess.Popen[str], number: int) -> None:
        """Signal the job's process group on its host, as Ctrl-C in a terminal or a scheduler does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, number)

    def launcher(self, *options: str, port: int = 29500) -> list[str]:
        """The `deepspeed` command up to the script; `options` are the launcher's."""
        line = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(self.hostfile)]
        return [*line, "--master_addr", self.addresses[0], "--master_port", str(port), *options]

    def deepspeed(self, script: str | Path, *argv: str, host: int = 0, **environment: str) -> subprocess.Popen[str]:
        """Start `deepspeed --hostfile ... script argv` on a host, which uses pdsh over ssh."""
        return self.run(host, [*self.launcher(), str(ROOT / script), *argv], **environment)

    def processes(self, host: int) -> dict[int, str]:
        """Commands on a host by process number outside it, without the ssh server and the tools that start it."""
        commands = {}
        for pid in _pids(self._namespace(host)):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if command and not Path(command.split()[0]).name.startswith(("sshd", "unshare", "nsenter")):
                    commands[pid] = command
        return commands

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    # --- the network ------------------------------------------------------------------------------------------------

    def link(self, host: int, up: bool) -> None:
        """Connect or disconnect a host's link: packets are dropped, and neither side gets an error."""
        self._ip(None, "link", "set", f"s{host}", "up" if up else "down")

    def limit(self, host: int, megabits: float | None) -> None:
        """Limit a host's link to so many 10^6 bits per second in each direction; None: no limit."""
        for where, device in ((host, "eth0"), (None, f"s{host}")):
            tc = ["tc", "-n", self._namespace(where), "qdisc"]
            if megabits is None:
                _call(*tc, "del", "dev", device, "root")
            else:
                # A bucket of 10 ms, and at least one segment of segmentation offload.
                burst = max(65536, int(megabits * 1e6 / 8 * 0.01))
                rate = ["rate", f"{round(megabits * 1e6)}bit", "burst", str(burst), "latency", "200ms"]
                _call(*tc, "replace", "dev", device, "root", "tbf", *rate)

    def slow(self, host: int, delay: float, loss: float) -> None:
        """Delay what a host sends by `delay` seconds, and drop a share `loss` of its packets.

        A process (relay.py) forwards them, because not every kernel has tc's netem.
        """
        a, b, bridge = f"t{host}a", f"t{host}b", f"br{host}"
        for tap in (a, b):
            self._ip(None, "tuntap", "add", "dev", tap, "mode", "tap")
        argv = [_tool("ip"), "netns", "exec", self._switch, sys.executable, str(Path(__file__).with_name("relay.py"))]
        relay = subprocess.Popen([*argv, a, b, str(delay), str(loss)], stdout=subprocess.PIPE,
                                 preexec_fn=_die_with_parent)  # fmt: skip
        self._relays[host] = relay
        assert relay.stdout is not None
        assert relay.stdout.readline() == b"ready\n"
        self._ip(None, "link", "add", "name", bridge, "type", "bridge")
        self._ip(None, "link", "set", "dev", bridge, "up")
        self._ip(None, "link", "set", a, "master", bridge, "up")
        self._ip(None, "link", "set", b, "master", "lan", "up")
        self._ip(None, "link", "set", f"s{host}", "master", bridge)

    def fast(self, host: int) -> None:
        """Undo `slow`."""
        self._ip(None, "link", "set", f"s{host}", "master", "lan")
        relay = self._relays.pop(host)
        relay.kill()
        relay.wait()
        for device in (f"t{host}a", f"t{host}b", f"br{host}"):
            self._ip(None, "link", "del", device)

    def traffic(self, host: int) -> tuple[int, int]:
        """Bytes that a host's eth0 has received and sent, with all headers."""
        record = json.loads(self._ip(host, "-s", "-j", "link", "show", "eth0"))[0]["stats64"]
        return record["rx"]["bytes"], record["tx"]["bytes"]
