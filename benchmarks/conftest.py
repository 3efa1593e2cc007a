"""Benchmarks share `sidebyside`; its table is printed after the run, beside pytest-benchmark's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import sidebyside
import torch

# As `fastgan train` has it without --tf32: what is called float32 here is float32 in cuDNN too.
torch.backends.cudnn.allow_tf32 = False


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in sidebyside.table():
        terminalreporter.write_line(line)
