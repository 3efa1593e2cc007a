"""What the elementwise and norm ops share: which machine runs their kernels, where those are, layouts, the ghost.

For each op the kernels of every implementation have the same functions, `OP_forward`, `OP_backward` and
`OP_second_backward`, whose arguments and results the op's file documents. They are `torch.ops.fastgan.*` for `cpp` and
`cuda` and the launchers in `fastgan.kernels.OP` for `triton`. All of them can rely on what the op's file sees to:

- tensors of x's shape in one call are dense and in one memory format, contiguous or channels_last (`dense`, `like`),
  at any alignment, with at least one element; the others are contiguous;
- dtypes and shapes fit, `act` is an index into `bias_act.ACTS`, gain > 0 and negative_slope >= 0.

They return tensors of x's shape in x's dtype and memory format, compute and accumulate in float32, and give
the same result for the same input, whatever the number of threads. Autograd is in the op's file alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgan.ops.backend import Implementation, Judge, forward_mode


def functions(op: str, name: str) -> Any:
    """What holds `OP_forward` and the others of the implementation `name`, which must be able to run here."""
    if name == "triton":
        return importlib.import_module(f"fastgan.kernels.{op}")
    return torch.ops.fastgan


def kernels(op: str, refuse: Judge | None = None) -> dict[str, Implementation]:
    """Entries of the kernels of `op` for its `Op`, in order of preference.

    Args:
        refuse: why none of them can run a call with these options (keywords, all optional); None when they can.
    """

    def judge(device: str, dtypes: tuple[torch.dtype, ...], machine: Callable[[], str | None]) -> Judge:
        cpu = device == "cpu"

        def able(*inputs: Tensor | None, **options: object) -> str | None:
            for x in inputs:
                if x is None:
                    continue
                if not (x.is_cpu if cpu else x.is_cuda):  # a third of the time of x.device.type, in every call
                    return f"it runs on {device}, not {x.device.type}"
                if x.dtype not in dtypes:
                    return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {x.dtype}"
                if x.numel() == 0:
                    return "it takes no empty tensors"
            return (refuse(**options) if refuse else None) or machine()

        return able

    half = (torch.float32, torch.bfloat16, torch.float16)
    return {
        "triton": Implementation(judge("cuda", half, partial(_no_triton, op)), note="Triton kernels", device="cuda"),
        "cuda": Implementation(judge("cuda", half, partial(_no_cuda, op)), note="CUDA kernels", device="cuda"),
        "cpp": Implementation(judge("cpu", half[:2], partial(_no_cpp, op)), note="C++ kernels", device="cpu"),
    }


def _constant(judge: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Ask once for each op; torch.compile takes the answer and does not trace the question."""
    cached = cache(judge)

    def ask(op: str) -> str | None:
        return cached(op)

    # What torch.compiler.assume_constant_result does; that imports the compiler.
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


@_constant
def _no_triton(op: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if importlib.util.find_spec(f"fastgan.kernels.{op}") else f"there is no Triton kernel of {op}"


@_constant
def _no_cuda(op: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    from fastgan.ops import extension

    return extension.cuda() or _not_registered(op, "CUDA") or _register_fakes(op)


@_constant
def _no_cpp(op: str) -> str | None:
    from fastgan.ops import extension

    return extension.cpu() or _not_registered(op, "CPU") or _register_fakes(op)


def _not_registered(op: str, key: str) -> str | None:
    name = f"{op}_forward"
    # A dispatcher that is asked about an op it does not know raises.
    if hasattr(torch.ops.fastgan, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgan::{name}", key):
        return None
    return f"the compiled library has no {op}"


@cache
def _register_fakes(op: str) -> None:
    """Tell torch.compile and torch.export the shapes and strides of the compiled functions' results.

    They are those of the same functions in plain PyTorch, where the op's file has them as COMPOSED.
    """
    composed = getattr(sys.modules.get(f"fastgan.ops.{op}"), "COMPOSED", None)
    for name, function in vars(composed).items() if composed else ():

        def fake(*arguments: Any, function: Callable[..., Any] = function) -> Any:
            found = function(*arguments)
            return tuple(map(torch.empty_like, found)) if isinstance(found, tuple) else torch.empty_like(found)

        torch.library.register_fake(f"fastgan::{name}", fake)


def _format(x: Tensor) -> torch.memory_format:
    """The memory format of x where it is dense, else the nearer one."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and (x.is_contiguous(memory_format=last) or x.stride(1) == 1):
        return last
    return torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x itself, or a copy of it, contiguous or in channels_last."""
    return x.contiguous(memory_format=_format(x))


def like(x: Tensor, other: Tensor) -> Tensor:
    """x itself, or a copy of it, in the memory format of `other`, which is dense and as large."""
    return x.contiguous(memory_format=_format(other))


def ghost(x: Tensor) -> Tensor:
    """A tensor of x's shape on one element of memory that nobody reads.

    Returned by a forward Function beside its output it stands for x in the graph: the second derivative with respect
    to x is sent to it and arrives at x as it is, while x's memory can be freed.
    """
    return torch.empty_strided(x.shape, [0] * x.ndim, dtype=x.dtype, device=x.device)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two gradients, where None is nothing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def no_third_order(op: str) -> NoReturn:
    """Raised by the backward of an op's second backward: a wrong result in silence would be the alternative."""
    raise NotImplementedError(f"third derivative of {op} is not implemented; backend='torch' has it")


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd follows a call on these tensors, backward or in forward mode."""
    if forward_mode():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def number(name: str, value: Any) -> float:
    """`value`, if it is a real number; a tensor is none, as kernels would keep no graph of it."""
    if value.__class__ is float or value.__class__ is int:
        return value
    if isinstance(value, (Tensor, str, bytes, complex)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {'a tensor' if isinstance(value, Tensor) else repr(value)}")
    return value


def plain(x: Any) -> bool:
    """Whether x is a tensor and of no class that stands for another, as FakeTensor does."""
    return x.__class__ is Tensor or x.__class__ is torch.nn.Parameter


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """dtype that sums over x are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_features(x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a floating [N, C, ...]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be a floating-point one, got dtype {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...], got {x.ndim} dimensions")
