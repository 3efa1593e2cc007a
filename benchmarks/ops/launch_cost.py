"""Host microseconds of our Triton launchers, without a GPU: Triton's driver is replaced by one that launches nothing.

    python -m benchmarks.ops.launch_cost

Kernels are compiled for sm_90 as usual; what is timed is all that Python does for one call, tensors are on the CPU. The
least of 300 rounds of 15 calls. "Triton by itself" is `kernel[grid](...)`; operations of torch (new tensors, views,
other layouts, sums of partial sums) are in the times, and two of them stand below.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastgan.kernels import (
    attention,
    bias_act,
    bias_act_pixel_norm,
    counter_rng,
    minibatch_stddev,
    pixel_norm,
    scaled_conv,
    tiles,
)
from fastgan.kernels.ahead_of_time import SHARED_MEMORY


class _Launcher:
    count = 0

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        _Launcher.count += 1


class _Utils:
    def __init__(self, architecture: str) -> None:
        self.shared = SHARED_MEMORY[architecture]

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared, "multiprocessor_count": 132}


class StubDriver:
    """What Triton asks of a driver; it launches nothing."""

    launcher_cls = _Launcher

    def __init__(self, architecture: str) -> None:
        self.utils = _Utils(architecture)
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def without_gpu(architecture: str = "sm_90") -> Iterator[None]:
    """Launch Triton kernels nowhere, as on a GPU of that architecture."""
    before = driver._active  # what is set now, without asking for a GPU
    driver.set_active(StubDriver(architecture))
    try:
        with mock.patch.object(tiles, "architecture", lambda device: architecture):
            yield
    finally:
        driver._active = before


def calls() -> dict[str, Callable[[], Any]]:
    """One call of each launcher: maps of 16 channels and 4 px, attention over as many, numbers for 16 samples."""
    x = torch.randn(8, 16, 4, 4).to(memory_format=torch.channels_last)
    large = torch.randn(8, 16, 8, 8).to(memory_format=torch.channels_last)
    bias, w = torch.randn(16), torch.randn(16, 16, 4, 4).to(memory_format=torch.channels_last)
    lrelu, silu = (2, 0.2, 1.0), (5, 0.2, 1.0)
    normed, stddev = bias_act_pixel_norm, minibatch_stddev
    y, r, t = torch.randn_like(x), torch.ones(8, 1, 4, 4), torch.ones(2, 1)
    maps = torch.randn(8, 17, 4, 4).to(memory_format=torch.channels_last)
    q, k, v, do = (torch.randn(2, 1, 16, 16) for _ in range(4))
    lse, at = torch.ones(2, 1, 16), (0.3, False)
    index = torch.arange(16)
    return {
        "bias_act forward": lambda: bias_act.bias_act_forward(x, bias, *lrelu),
        "bias_act backward": lambda: bias_act.bias_act_backward(x, x, None, *lrelu, False),
        "bias_act backward, bias": lambda: bias_act.bias_act_backward(x, x, None, *lrelu, True),
        "bias_act second backward": lambda: bias_act.bias_act_second_backward(x, x, x, bias, *silu, False),
        "bias_act_pixel_norm forward": lambda: normed.bias_act_pixel_norm_forward(x, bias, *lrelu, 1e-8),
        "bias_act_pixel_norm backward": lambda: normed.bias_act_pixel_norm_backward(x, y, r, *lrelu, False),
        "bias_act_pixel_norm second backward": lambda: normed.bias_act_pixel_norm_second_backward(
            x, x, y, r, *lrelu, False
        ),
        "pixel_norm forward": lambda: pixel_norm.pixel_norm_forward(x, 1e-8),
        "pixel_norm backward": lambda: pixel_norm.pixel_norm_backward(x, y, r),
        "pixel_norm second backward": lambda: pixel_norm.pixel_norm_second_backward(x, x, y, r),
        "minibatch_stddev forward": lambda: stddev.minibatch_stddev_forward(x, 4, 1, 1e-8),
        "minibatch_stddev backward": lambda: stddev.minibatch_stddev_backward(maps, x, 4, 1, 1e-8),
        "minibatch_stddev second backward": lambda: stddev.minibatch_stddev_second_backward(x, x, t, 4, 1, 1e-8),
        "scaled_conv down": lambda: scaled_conv.down(large, w, bias, *lrelu),
        "scaled_conv up": lambda: scaled_conv.up(x, w, bias, *lrelu),
        "scaled_conv weight": lambda: scaled_conv.weight(x, large),
        "attention forward": lambda: attention.attention_forward(q, k, v, *at),
        "attention backward": lambda: attention.attention_backward(do, q, k, v, do, lse, *at),
        "attention second backward": lambda: attention.attention_second_backward(q, k, v, do, q, k, v, do, lse, *at),
        "random numbers, uniform": lambda: counter_rng.uniform(77, index, 1),
        "random numbers, normal": lambda: counter_rng.normal(77, index, 512),
        "random numbers, integers": lambda: counter_rng.integers(77, index, 10),
    }


def bare_launch() -> Callable[[], Any]:
    """Triton's own part of `bias_act_forward`."""
    x, kernel = torch.randn(8, 16), bias_act._forward_kernel
    arguments: dict[str, Any] = {
        "x": x, "bias": None, "y": x, "rows": 8, "cols": 16, "channels": 16, "slope": 0.2, "gain": 1.0,
        "ACT": 2, "LAST": True, "ROWS": 8, "COLS": 16, "INT64": False, "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    return lambda: kernel[(1,)](**arguments)


def microseconds(call: Callable[[], Any], rounds: int = 300, repeats: int = 15) -> float:
    call()
    least = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        least = min(least, (time.perf_counter() - began) / repeats)
    return 1e6 * least


class _Operations(TorchDispatchMode):
    """Counts torch's own operations in a call."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def what_it_does(call: Callable[[], Any]) -> tuple[int, int]:
    """Launches of Triton, and torch's own operations: new tensors, views, layouts, sums."""
    before = _Launcher.count
    with _Operations() as operations:
        call()
    return _Launcher.count - before, operations.count


def main() -> None:
    x: Tensor = torch.randn(8, 16, 4, 4)
    with without_gpu():
        print(f"{'':36}{'us a call':>10}{'launches':>10}{'us a launch':>12}{'operations of torch':>21}")
        print(f"{'Triton by itself':36}{microseconds(bare_launch()):10.1f}{1:10}")
        for name, call in calls().items():
            us = microseconds(call)
            launches, operations = what_it_does(call)
            print(f"{name:36}{us:10.1f}{launches:10}{us / launches:12.1f}{operations:21}", flush=True)
    print(f"{'torch.empty_like':36}{microseconds(lambda: torch.empty_like(x)):10.1f}")
    print(f"{'torch.add':36}{microseconds(lambda: x + x):10.1f}")


if __name__ == "__main__":
    main()
