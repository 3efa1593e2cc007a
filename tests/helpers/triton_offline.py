"""Triton kernels where there is no GPU: interpreted on CPU tensors, and compiled ahead of time.

The launchers themselves are called in both cases. To interpret, the kernels they reach for are swapped for interpreted
ones; how they are compiled is in fastgan/kernels/ahead_of_time.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux alone)")

with contextlib.suppress(
    ImportError
):  # the interpreter imports it on its first run, and it wants the library unswapped
    import triton.experimental.gluon.language
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from fastgan.kernels.ahead_of_time import Launch, compiled, launches, swapped

# Interpreted on the CPU, or on the GPU: the same test. Interpreted bfloat16 is silently wrong, so it is a GPU's alone.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cpu", torch.float16, id="cpu-float16"),
    pytest.param("cuda", torch.float32, id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
]


@contextlib.contextmanager
def running(device: str) -> Iterator[None]:
    """Kernels run on tensors of `device`, on a CPU by interpretation, and every new tensor is full of NaN."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made

        return poisoned

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poison(getattr(torch, name)))
        if device == "cpu":
            # Triton's own library is jitted code as well (tl.cdiv, tl.zeros ...).
            library = (triton.language, triton.language.standard)
            stack.enter_context(swapped(lambda kernel: InterpretedFunction(kernel.fn), *library))
            # The interpreter patches the language at every call and leaves some of it so, which a later compilation
            # would meet: patched once here, and restored.
            language = SimpleNamespace(tl=triton.language, core=triton.language.core)
            scope = interpreter._patch_lang(SimpleNamespace(__globals__=vars(language)))
            # Triton 3.6 fails here with numpy 2.4, which makes no number of an array of one.
            scope.set_attr(triton.language.tensor, "__index__", lambda it: int(it.handle.data.item()))
            stack.callback(scope.restore)
            patch.setattr(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None))
        yield


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values; infinite for a NaN."""
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    size = expected.double().square().mean().sqrt().item()
    error = difference / size if size else difference
    return math.inf if math.isnan(error) else error


def check(actual: Tensor, exact: Tensor, plain: Tensor, name: str, floor: float = 0.0) -> None:
    """The error against float64 is at most twice that of plain PyTorch in the same dtype, or `floor` if that is more.

    Beyond that the dtype's rounding is allowed, where plain PyTorch happens to be exact; of zeros, eight of it.
    """
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    if exact.numel():
        ours, theirs = relative_rms(actual, exact), relative_rms(plain, exact)
        limit = max(2 * theirs + torch.finfo(plain.dtype).eps * (1 if exact.any() else 8), floor)
        assert ours <= limit, f"{name}: error {ours:.2e}, plain PyTorch {theirs:.2e}"


def check_resources(architecture: str, launcher: Callable[[], Any], record: Callable[[str, object], None]) -> None:
    """Every kernel that `launcher` launches compiles without a spill, within the memory that a program has."""
    check_launches(architecture, launches(architecture, launcher), record)


def check_launches(architecture: str, found: list[Launch], record: Callable[[str, object], None]) -> None:
    assert found
    wrong = []
    for it in found:
        resources = compiled(it, architecture)
        record(f"{it.name} {architecture}", str(resources))
        if not resources.fits(architecture):
            wrong.append(f"{it.name}: {resources}")
    assert not wrong, f"{architecture}: {'; '.join(wrong)}"
