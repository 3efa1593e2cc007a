"""The simulated hosts of the other cluster tests: separated, breakable, and removed afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hosts
import pytest
from hosts import Hosts, _namespaces


@pytest.fixture(scope="module")
def two(make_hosts: Callable[..., Hosts]) -> Hosts:
    return make_hosts(2, disk_mb=1)


def output_of(hosts: Hosts, host: int, command: str) -> str:
    return hosts.run(host, ["sh", "-c", command]).communicate(timeout=60)[0].strip()


def seconds(hosts: Hosts, kilobytes: int) -> float:
    """Seconds to copy so many kilobytes from the second host to the first."""
    began = time.monotonic()
    assert output_of(hosts, 0, f"ssh h2 'head -c {1000 * kilobytes} /dev/zero' | wc -c") == str(1000 * kilobytes)
    return time.monotonic() - began


def test_hosts_have_their_own_names_addresses_and_processes(two: Hosts) -> None:
    assert output_of(two, 0, "hostname; pdsh -S -R ssh -w h1,h2 hostname").split("\n")[0] == "h1"
    assert sorted(output_of(two, 0, "pdsh -S -R ssh -w h1,h2 hostname").splitlines()) == ["h1: h1", "h2: h2"]
    job = two.run(1, ["sleep", "100"])
    while "sleep 100" not in two.processes(1).values():
        time.sleep(0.01)
    assert "sleep 100" not in two.processes(0).values()
    assert "sleep" not in output_of(two, 0, "ps ax")  # a launcher's `pkill` must not reach another host
    two.send(job, signal.SIGTERM)
    job.wait(timeout=10)
    gone_by = time.monotonic() + 10  # the signal reaches the job before its child
    while two.processes(1) and time.monotonic() < gone_by:
        time.sleep(0.01)
    assert two.processes(1) == {}


@pytest.mark.slow
def test_links_go_down_and_are_limited_and_slowed(two: Hosts) -> None:
    two.link(1, up=False)
    answer = output_of(two, 0, "ssh -o ConnectTimeout=1 h2 hostname 2>&1").lower()
    two.link(1, up=True)
    assert "timed out" in answer or "no route to host" in answer  # the latter if the ARP entry expired first
    received, sent = two.traffic(1)
    plain = seconds(two, 500)
    assert 500e3 < two.traffic(1)[1] - sent < 600e3
    assert two.traffic(1)[0] - received < 100e3
    two.limit(1, megabits=2)
    assert seconds(two, 500) > plain + 1.2  # 4 Mbit at 2 Mbit/s, less the bucket
    two.limit(1, None)
    two.slow(1, delay=0.1, loss=0.0)
    assert seconds(two, 1) > plain + 0.4  # TCP, key exchange and login take at least four round trips
    two.fast(1)
    assert output_of(two, 0, "ssh h2 hostname") == "h2"


def test_crashed_host_boots_again(two: Hosts) -> None:
    job = two.run(1, ["sleep", "100"])
    two.crash(1)
    assert job.wait(timeout=10) != 0
    assert two.processes(1) == {}
    two.boot(1)
    assert output_of(two, 0, "ssh h2 hostname") == "h2"


def test_shared_disk_can_be_full(two: Hosts) -> None:
    assert "No space" in output_of(two, 0, f"head -c 2000000 /dev/zero > {two.disk}/file")
    assert output_of(two, 1, f"stat -c %s {two.disk}/file") != ""


def test_hosts_of_a_killed_test_process_are_removed(namespaces_available: None, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hosts import Hosts; "
        "h = Hosts(1, Path(sys.argv[1]), disk_mb=1); h.run(0, ['sleep', '1000']); print(h._prefix, flush=True); "
        "time.sleep(1000)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(hosts.__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               env=environment)  # fmt: skip
    assert process.stdout is not None
    prefix = process.stdout.readline().strip()
    assert prefix and any(name.startswith(prefix) for name in _namespaces())
    process.kill()
    process.communicate()
    other = tmp_path / "other"
    other.mkdir()
    with Hosts(1, other):  # removes leftovers first
        assert not any(name.startswith(prefix) for name in _namespaces())
        assert prefix not in Path("/proc/mounts").read_text()
        assert any(name.startswith(f"fastgan-test-{os.getpid()}-") for name in _namespaces())
