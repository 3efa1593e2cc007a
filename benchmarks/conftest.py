"""Benchmarks share `benchmarks.side_by_side`; its table is printed after the run, beside pytest-benchmark's own."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import side_by_side

# As `fastgan train` has it without --tf32: what is called float32 here is float32 in cuDNN too.
torch.backends.cudnn.allow_tf32 = False


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in side_by_side.table():
        terminalreporter.write_line(line)
