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
def possible() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(f"hosts of the tests' own: {reason}")


@pytest.fixture(scope="module")
def make_hosts(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Hosts]]:
    """`make_hosts(count, ...)`: hosts that go when the module's tests are done, or before that with `close`."""
    with ExitStack() as stack:

        def make(count: int, **options: Any) -> Hosts:
            folder: Path = tmp_path_factory.mktemp("hosts")
            return stack.enter_context(Hosts(count, folder, **options))

        yield make


@pytest.fixture
def draw() -> random.Random:
    seed = int(os.environ.get("FASTGAN_FAULT_SEED", random.randrange(10**6)))
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "fastgan" / "train.py")]
    subprocess.run([*line, *FLAGS, "--out", str(run)], stdout=subprocess.DEVNULL, check=True, timeout=200)
    return run
