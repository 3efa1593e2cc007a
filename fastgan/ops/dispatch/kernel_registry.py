"""The implementations that are compiled kernels: `triton`, `cuda` and `cpp`, and whether they can run here.

Which implementation of an op runs is decided in `backend.py`; this file gives it the entries of the kernels.

The kernels of an op have the same functions in every implementation, `OP_forward`, `OP_backward` and
`OP_second_backward`, with the arguments and results that the op's file documents: `torch.ops.fastgan.*` for `cpp` and
`cuda`, the launchers in `fastgan.kernels.OP` for `triton`. They contain no autograd. The op's file makes sure that

- tensors of x's shape in one call are dense and in one memory format, contiguous or channels_last (`arguments.dense`
  and `dense_like`), at any alignment, with at least one element; other tensors are contiguous;
- dtypes and shapes fit, `act` is an index into `bias_act.ACTS`, gain > 0 and negative_slope >= 0.

They return tensors of x's shape in x's dtype and memory format, compute and accumulate in float32, and give the same
result for the same input, whatever the number of threads.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.dispatch.backend import Implementation, ReasonFn
from fastgan.ops.dispatch.torch_private import constant_when_compiled, dispatcher_has_kernel


def kernel_functions(op: str, implementation: str) -> Any:
    """The module or namespace with `OP_forward` and the others, of an implementation that can run here."""
    if implementation == "triton":
        return importlib.import_module(f"fastgan.kernels.{op}")
    return torch.ops.fastgan


def kernel_implementations(op: str, unsupported_options: ReasonFn | None = None) -> dict[str, Implementation]:
    """Entries of the kernels of `op` for its `Op`.

    Args:
        op: name of the op, as in the names of its files and functions.
        unsupported_options: called with the options of a call (keywords, all optional); returns why no kernel of this
            op supports them, or None.
    """
    half = (torch.float32, torch.bfloat16, torch.float16)

    def entry(note: str, device: str, dtypes: tuple[torch.dtype, ...], machine: ReasonFn) -> Implementation:
        on_cpu = device == "cpu"

        def unsupported_reason(*inputs: Tensor | None, **options: object) -> str | None:
            for x in inputs:
                if x is None:
                    continue
                if not (x.is_cpu if on_cpu else x.is_cuda):  # a third of the time of x.device.type, in every call
                    return f"it runs on {device}, not {x.device.type}"
                if x.dtype not in dtypes:
                    return f"it supports {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {x.dtype}"
                if x.numel() == 0:
                    return "it supports no empty tensors"
            return (unsupported_options(**options) if unsupported_options else None) or machine()

        return Implementation(unsupported_reason, note=note, device=device)

    return {
        "triton": entry("Triton kernels", "cuda", half, partial(_no_triton, op)),
        "cuda": entry("CUDA kernels", "cuda", half, partial(_no_cuda, op)),
        "cpp": entry("C++ kernels", "cpu", half[:2], partial(_no_cpp, op)),
    }


@constant_when_compiled
@cache
def no_products_reason(gpu: int | None) -> str | None:
    """Why a GPU cannot run Triton kernels of matrix products: their tiles need what came with compute capability 8.0.

    Compiled for sm_75, they spill thousands of bytes, or need more shared memory than it has.
    """
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(gpu)
    return None if major >= 8 else f"it needs compute capability 8.0, GPU {gpu} has {major}.{minor}"


def _once_per_op(reason: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Compute the answer once for each op; torch.compile takes it for a constant."""
    cached = cache(reason)

    def call(op: str) -> str | None:
        return cached(op)

    return constant_when_compiled(call)


@_once_per_op
def _no_triton(op: str) -> str | None:
    """Why the Triton kernels of `op` cannot run on this machine."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if importlib.util.find_spec(f"fastgan.kernels.{op}") else f"there is no Triton kernel of {op}"


@_once_per_op
def _no_cuda(op: str) -> str | None:
    """Why the CUDA kernels of `op` cannot run on this machine."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    from fastgan.ops.dispatch import extension

    return extension.cuda() or _not_registered(op, "CUDA") or _register_fakes(op)


@_once_per_op
def _no_cpp(op: str) -> str | None:
    """Why the C++ kernels of `op` cannot run on this machine."""
    from fastgan.ops.dispatch import extension

    return extension.cpu() or _not_registered(op, "CPU") or _register_fakes(op)


def _not_registered(op: str, key: str) -> str | None:
    name = f"{op}_forward"
    # The dispatcher raises for a name that it does not know.
    if hasattr(torch.ops.fastgan, name) and dispatcher_has_kernel(f"fastgan::{name}", key):
        return None
    return f"the compiled library has no {op}"


@cache
def _register_fakes(op: str) -> None:
    """Register for torch.compile and torch.export the shapes and strides of what the compiled functions return.

    They are those of the same functions in plain PyTorch, `PYTORCH_KERNELS` in the op's file.
    """
    kernels = getattr(sys.modules.get(f"fastgan.ops.{op}"), "PYTORCH_KERNELS", None)
    for name, function in vars(kernels).items() if kernels else ():

        def fake(*arguments: Any, function: Callable[..., Any] = function) -> Any:
            result = function(*arguments)
            return tuple(map(torch.empty_like, result)) if isinstance(result, tuple) else torch.empty_like(result)

        torch.library.register_fake(f"fastgan::{name}", fake)
