"""Settings of all benchmarks. The table of `benchmarks.side_by_side` is printed after that of pytest-benchmark."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import side_by_side

# As `fastgan train` with --precision fp32: float32 means float32 in cuDNN as well.
torch.backends.cudnn.allow_tf32 = False
# As training has it: on a GPU cuDNN times its algorithms at the first call of a shape, which is never measured here.
torch.backends.cudnn.benchmark = True


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in side_by_side.summary():
        terminalreporter.write_line(line)
