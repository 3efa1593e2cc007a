from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts, missing


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
