"""A host that differs from the others is refused at the start, or makes no difference; with the real launcher."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from faults import finish, moment, ranks, start
from hosts import Hosts

import fastgan
from fastgan.cli import prepare

MakeHosts = Callable[..., Hosts]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(make_hosts: MakeHosts) -> Hosts:
    """Two hosts; the second one has its own files, and stores no compiled Python modules."""
    hosts = make_hosts(2)
    hosts.own[1]["PYTHONDONTWRITEBYTECODE"] = "1"
    hosts.crash(1)
    hosts.boot(1)
    return hosts


@pytest.fixture
def differing(two: Hosts) -> Iterator[Callable[[Path, Path], None]]:
    """`differing(path, other)`: the second host has `other` at `path` until the test ends."""
    yield lambda path, other: two.replace(1, path, other)
    two.crash(1)
    two.boot(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prepared sets: one, one with other images, and a copy of the first with one changed byte."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("set", "8"), ("other", "16")):
        assert prepare.main(["digits", str(folder / name), "--resolution", size]) == 0
    shutil.copytree(folder / "set", folder / "changed")
    file = next((folder / "changed").glob("cache/0008/*.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return folder


def refused(hosts: Hosts, run: Path, *flags: str) -> str:
    """The error line of a job that ends before its first step, leaves no process, and is not restarted."""
    job = start(hosts, run, "--max-restarts", "1", *flags)
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 2 and "Traceback" not in output and "start 2" not in output, output
    assert hosts.processes(0) == hosts.processes(1) == {}
    assert not (run / "checkpoints").exists()
    return next(line for line in output.splitlines() if " on h2 (rank 1) must be " in line)


@pytest.mark.parametrize(("package", "name"), [(fastgan, "__init__.py"), (torch, "version.py")])
def test_different_packages_are_refused(
    two: Hosts, differing: Callable[[Path, Path], None], tmp_path: Path, package: Any, name: str
) -> None:
    source, other = Path(package.__file__).parent / name, tmp_path / "other.py"
    other.write_text(re.sub(r"""__version__ = ["'].*["']""", "__version__ = '0.0.1'", source.read_text()))
    differing(source, other)
    line = refused(two, tmp_path / "run")
    assert f"{package.__name__}'s version on h2 (rank 1) must be " in line and line.endswith("got '0.0.1'"), line
    assert str(package.__version__) in line and "on h1 (rank 0)" in line, line


def test_different_seed_is_refused(two: Hosts, differing: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """Each host reads its settings from its own file."""
    for name, seed in (("config", 3), ("other", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"run:\n  seed: {seed}\n")
    differing(tmp_path / "config.yaml", tmp_path / "other.yaml")
    line = refused(two, tmp_path / "run", "--config", str(tmp_path / "config.yaml"))
    assert "--seed on h2 (rank 1) must be 3, as on h1 (rank 0), got 4" in line


@pytest.mark.parametrize("other", ["other", "changed"])
def test_different_data_are_refused(
    two: Hosts, differing: Callable[[Path, Path], None], data: Path, tmp_path: Path, other: str
) -> None:
    """Another set, and one that contradicts its manifest."""
    differing(data / "set", data / other)
    line = refused(two, tmp_path / "run", "--data", str(data / "set"))
    assert "--data on h2 (rank 1) must be " in line, line
    assert other == "other" or re.search(r"\.npy has been changed: its sha256 is ", line), line


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The library that shifts the time of day, and the file with the shift in seconds."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the library that shifts a host's clock")
    folder = tmp_path_factory.mktemp("clock")
    library = folder / "clock.so"
    source = Path(hosts.__file__).with_name("shifted_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    (folder / "shift").write_text("0")
    return str(library), folder / "shift"


@pytest.mark.parametrize(("host", "before", "after"), [(1, 3600, -86400), (0, -3600, 86400)])
def test_wrong_clock_makes_no_difference(
    make_hosts: MakeHosts,
    reference: Path,
    tmp_path: Path,
    draw: random.Random,
    clock: tuple[str, Path],
    host: int,
    before: int,
    after: int,
) -> None:
    """A clock that is one hour wrong and then jumps by a day: a link that is down for 5 s is no fault, a dead rank is
    named, the newest checkpoint is resumed, and the weights are the same."""
    hosts, run = make_hosts(2), tmp_path / "run"
    library, shift = clock
    shift.write_text(str(before))
    hosts.own[host] |= {"LD_PRELOAD": library, "FASTGAN_TEST_CLOCK": str(shift)}
    hosts.crash(host)
    hosts.boot(host)
    seen = [int(hosts.run(at, ["date", "+%s"]).communicate(timeout=20)[0]) for at in (0, 1)]
    wrong = seen[host] - seen[1 - host]
    assert abs(wrong - before) < 20
    job = start(hosts, run, "--max-restarts", "1")
    with moment(hosts, job, run, draw, "step"):
        shift.write_text(str(after))
    with moment(hosts, job, run, draw, "step"):
        hosts.link(1, up=False)
    time.sleep(5)
    hosts.link(1, up=True)
    with moment(hosts, job, run, draw, "step"):
        hosts.kill(ranks(hosts, 1)[0])
    output = finish(hosts, job, run, reference)
    reports = re.findall(
        r"rank 1 on h2: its connection closed: the process died; the last checkpoint is (\S+);", output
    )
    resumed = re.findall(r"restarting from (\S+), restarts left: 1", output)
    assert len(reports) == 1 and len(resumed) == 1 and Path(reports[0]).name <= Path(resumed[0]).name, output
    hosts.close()
