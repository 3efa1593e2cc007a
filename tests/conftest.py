from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from torch.utils._python_dispatch import TorchDispatchMode

# A shell starts its background jobs with Ctrl-C ignored, and nohup ignores the end of a session: the commands that
# tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The shipped table decides, in the processes that tests start too: what a test runs does not depend on times.
os.environ["FASTGAN_QUALIFY"] = "0"

# As `fastgan train` has it with --precision fp32: what is called float32 here is float32 in cuDNN too.
torch.backends.cudnn.allow_tf32 = False

# The same examples in every run, and others in each `make test-all` (--hypothesis-profile random). Hypothesis keeps its
# files out of the checkout: no database of examples, and a folder for the rest that lasts as long as this process.
hypothesis.settings.register_profile("default", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("random", database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")
_hypothesis_folder = tempfile.mkdtemp(prefix="hypothesis-")
set_hypothesis_home_dir(_hypothesis_folder)
atexit.register(shutil.rmtree, _hypothesis_folder, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Tests that are not for a GPU see none, as commands that they start would take it, and ranks share it."""
    if "not gpu" in (config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def independent_of_other_tests() -> Iterator[None]:
    """Every test starts with the same random numbers, and with the denormals that training flushes to zero."""
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)


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
