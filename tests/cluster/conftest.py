from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from faults import FLAGS
from hosts import ROOT, Hosts, missing


@pytest.fixture(scope="session")
def namespaces_available() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(f"no simulated hosts: {reason}")


@pytest.fixture(scope="module")
def make_hosts(namespaces_available: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Hosts]]:
    """`make_hosts(count, ...)`: hosts that are removed by `close`, or after the module's tests."""
    with ExitStack() as stack:

        def make(count: int, **options: Any) -> Hosts:
            folder: Path = tmp_path_factory.mktemp("hosts")
            return stack.enter_context(Hosts(count, folder, **options))

        yield make


@pytest.fixture
def hosts(namespaces_available: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts of one test."""
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as two:
        yield two


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture
def draw() -> random.Random:
    """Random moments and choices; FASTGAN_FAULT_SEED repeats those of a run that printed `seed N`."""
    seed = int(os.environ.get("FASTGAN_FAULT_SEED", random.randrange(10**6)))
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks without a fault."""
    run = tmp_path_factory.mktemp("reference") / "run"
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "fastgan" / "train.py")]
    subprocess.run([*line, *FLAGS, "--out", str(run)], stdout=subprocess.DEVNULL, check=True, timeout=200)
    return run
