"""Host microseconds of our Triton launchers, without a GPU: Triton's driver is replaced by one that launches nothing.

    python -m benchmarks.ops.launch_cost

Kernels are compiled for sm_90 as usual; what is timed is all that Python does for one call, tensors are on the CPU. The
least of nine rounds of 300 calls. "bare" is Triton's own launch with everything known, the floor of all others; an
operation of PyTorch stands beside them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastgan.kernels import bias_act, bias_act_pixel_norm, minibatch_stddev, pixel_norm, scaled_conv, tiles


class _Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class StubDriver:
    """What Triton asks of a driver; it launches nothing."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Launch Triton kernels nowhere, as on an sm_90."""
    before = driver._active  # what is set now, without asking for a GPU
    driver.set_active(StubDriver())
    try:
        with mock.patch.object(tiles, "architecture", lambda device: "sm_90"):
            yield
    finally:
        driver._active = before


def calls() -> dict[str, Callable[[], Any]]:
    """One call of each launcher, on maps of 16 channels and 4 px."""
    x = torch.randn(8, 16, 4, 4).to(memory_format=torch.channels_last)
    large = torch.randn(8, 16, 8, 8).to(memory_format=torch.channels_last)
    bias, w = torch.randn(16), torch.randn(16, 16, 4, 4)
    normed, stddev = bias_act_pixel_norm, minibatch_stddev
    y, r = normed.bias_act_pixel_norm_forward(x, bias, 2, 0.2, 1.0, 1e-8)
    t = torch.ones(2, 1)
    return {
        "bias_act forward": lambda: bias_act.bias_act_forward(x, bias, 2, 0.2, 1.0),
        "bias_act backward": lambda: bias_act.bias_act_backward(x, x, None, 2, 0.2, 1.0, False),
        "bias_act_pixel_norm forward": lambda: normed.bias_act_pixel_norm_forward(x, bias, 2, 0.2, 1.0, 1e-8),
        "pixel_norm backward": lambda: pixel_norm.pixel_norm_backward(x, y, r),
        "minibatch_stddev second backward": lambda: stddev.minibatch_stddev_second_backward(x, x, t, 4, 1, 1e-8),
        "scaled_conv down": lambda: scaled_conv.down(large, w),
        "scaled_conv up": lambda: scaled_conv.up(x, w),
    }


def bare_launch() -> Callable[[], Any]:
    """Triton's own part of `bias_act_forward`."""
    x, kernel = torch.randn(8, 16), bias_act._forward_kernel
    arguments: dict[str, Any] = {
        "x": x, "bias": None, "y": x, "rows": 8, "cols": 16, "channels": 16, "slope": 0.2, "gain": 1.0,
        "ACT": 2, "LAST": True, "ROWS": 8, "COLS": 16, "INT64": False, "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    return lambda: kernel[(1,)](**arguments)


def microseconds(call: Callable[[], Any], rounds: int = 9, repeats: int = 300) -> float:
    call()
    least = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        least = min(least, (time.perf_counter() - began) / repeats)
    return 1e6 * least


def empty_results(call: Callable[[], Any]) -> int:
    """How many tensors a call allocates, as each costs the host what `torch.empty_like` does."""
    with (
        mock.patch.object(torch, "empty_like", wraps=torch.empty_like) as like,
        mock.patch.object(torch, "empty", wraps=torch.empty) as empty,
    ):
        call()
    return like.call_count + empty.call_count


def main() -> None:
    x: Tensor = torch.randn(8, 16, 4, 4)
    with without_gpu():
        print(f"{'bare':34}{microseconds(bare_launch()):8.1f} us")
        for name, call in calls().items():
            print(f"{name:34}{microseconds(call):8.1f} us, {empty_results(call)} of its tensors are new")
    print(f"{'torch.empty_like':34}{microseconds(lambda: torch.empty_like(x)):8.1f} us")
    print(f"{'torch.add':34}{microseconds(lambda: x + x):8.1f} us")


if __name__ == "__main__":
    main()
