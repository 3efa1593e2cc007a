"""For pytest in piece 6: shuffles by a fixed seed, leaves out what is done, writes every result at once."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

_SEED = 25


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(json.loads(Path(os.environ["FASTGAN_PIECE_DONE"]).read_text()))
    left = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    random.Random(_SEED).shuffle(left)
    items[:] = left


class _Rows:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row: dict[str, Any] = {"label": report.nodeid, "seconds": round(report.duration, 2)}
        if report.failed:
            row["fault"] = str(report.longrepr)[-600:]
        elif report.skipped:  # on a machine with a GPU nothing may be
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
            row["fault"] = f"skipped: {str(reason)[:300]}"
        elif report.when != "call":
            return
        with open(os.environ["FASTGAN_PIECE_ROWS"], "a") as file:
            file.write(json.dumps(row) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # one process writes, also with several workers
        config.pluginmanager.register(_Rows())
