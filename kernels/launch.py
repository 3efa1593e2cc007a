"""Shared by the launchers: the launch itself, device, precision of float32 products, offset width, memory format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


class Plan:
    """How a kernel is launched on arguments of certain sizes and strides. Made once for these, as it takes long.

    Args:
        grid: of the launch.
        constants: arguments of the kernel and options of the launch that follow from the sizes: numbers, not tensors.
        partial: shape of the kernel's partial sums, if it has any.
    """

    def __init__(self, grid: tuple[int], constants: Mapping[str, Any], partial: tuple[int, ...] = ()) -> None:
        self.grid, self.constants, self.partial = grid, constants, partial
        # What Triton specializes on besides `constants` -> the kernel (kept, as its id is in the key), its launch on
        # this grid, its arguments, and the places of those among them that a launch brings.
        self._compiled: dict[tuple[Any, ...], tuple[Any, Callable[..., None], list[Any], list[int]]] = {}

    def launch(self, kernel: Any, device: torch.device, **arguments: Any) -> None:
        """Launch `kernel` on a device with the other arguments: tensors, None, floats, constants; in the same order.

        Triton's own way from `kernel[grid]` to the compiled kernel classifies every argument anew. Here it is taken
        once; later launches with tensors of the same types and alignments call the compiled kernel.
        """
        with device_guard(device):
            if kernel.__class__ is not JITFunction:  # interpreted, or recorded
                kernel[self.grid](**arguments, **self.constants)
                return
            key: list[Any] = [id(kernel), device.index]
            for value in arguments.values():
                if isinstance(value, Tensor):
                    key += value.dtype, value.data_ptr() % 16
                else:
                    key.append(float if value.__class__ is float else value)
            known = self._compiled.get(tuple(key))
            if known is None:
                compiled = kernel[self.grid](**arguments, **self.constants)
                names = kernel.arg_names
                fixed = [self.constants.get(name) for name in names]
                places = [names.index(name) for name in arguments]
                self._compiled[tuple(key)] = kernel, compiled[(*self.grid, 1, 1)], fixed, places
                return
            _, run, fixed, places = known
            given = fixed.copy()
            for i, value in zip(places, arguments.values(), strict=True):
                given[i] = value
            run(*given)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` is the same by way of objects of Triton's language, which take much longer."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1; see `ceil_div`."""
    return 1 << (n - 1).bit_length()


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current, as Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def kind_of(dtype: torch.dtype, products: Literal["matmul", "conv"]) -> tuple[str, str]:
    """Kind of numbers as in `tiles.KINDS`, and `input_precision` of `tl.dot`, which is one and the same for halves."""
    if dtype != torch.float32:
        return "half", "ieee"
    precision = float32_precision(products)
    return ("tf32" if precision == "tf32" else "float32"), precision


def float32_precision(products: Literal["matmul", "conv"]) -> str:
    """`input_precision` of `tl.dot`: "ieee", or "tf32" if torch allows it in these products of float32 on a GPU.

    The one place that reads torch's settings, so that a kernel of ours computes as cuBLAS and cuDNN do beside it. They
    form a tree: what is "none" for an operation is that of its backend, and what is "none" there that of all backends.
    """
    backends: Any = torch.backends
    operation = backends.cuda.matmul if products == "matmul" else backends.cudnn.conv
    for setting in (operation, backends.cudnn, backends):
        if setting.fp32_precision != "none":
            return "tf32" if setting.fp32_precision == "tf32" else "ieee"
    return "ieee"


Layout = tuple[Sequence[int], Sequence[int]]
"""Sizes and strides of a tensor."""


def needs_int64_offsets(*layouts: Layout, dims: int) -> bool:
    """Whether an offset within the last `dims` dimensions of any tensor can exceed 2^31 - 1 elements."""
    for sizes, strides in layouts:
        # Tiles extend past the edge by less than a tile; those addresses are computed, though not read.
        reach = sum((size + 256) * abs(step) for size, step in zip(sizes[-dims:], strides[-dims:], strict=True))
        if reach >= 2**31:
            return True
    return False


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are contiguous in dense x [N, C, ...]."""
    return not x.is_contiguous()
