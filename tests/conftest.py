from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A shell starts its background jobs with Ctrl-C ignored, and the commands that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.convolution.default:
            self.count += 1
        elif op is torch.ops.aten.convolution_backward.default:
            self.count += sum(args[-1][:2])
        elif getattr(op, "name", str)().startswith("fastgan::conv2d_"):
            self.count += 1
        return op(*args, **(kwargs or {}))


@pytest.fixture
def products() -> Callable[[Callable[[], object]], int]:
    """Convolution-sized products that a function computes: an input gradient and a weight gradient count one each."""

    def count(function: Callable[[], object]) -> int:
        with _Products() as seen:
            function()
        return seen.count

    return count
