"""Benchmarks share `sidebyside`; its table is printed after the run, beside pytest-benchmark's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import sidebyside


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in sidebyside.table():
        terminalreporter.write_line(line)
