"""Triton kernels without a GPU: interpreted on CPU tensors, or compiled ahead of time.

Both call the real launchers. To interpret, their kernels are replaced by interpreted ones; kernels/ahead_of_time.py
compiles them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed (it is for Linux only)")

with contextlib.suppress(ImportError):
    # The interpreter imports this on its first run, when the library is already replaced, which fails.
    import triton.experimental.gluon.language
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from fastgan.kernels.ahead_of_time import Launch, compile_launch, record_launches, replaced_kernels

# The same tests run on the CPU, interpreted, and on a GPU. The interpreter computes bfloat16 incorrectly, without an
# error, so bfloat16 needs a GPU.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cpu", torch.float16, id="cpu-float16"),
    pytest.param("cuda", torch.float32, id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
]


# What kernels without matrix products are compiled for; those with them need sm_80. Quick tests take the first three.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_86", "sm_89", "sm_120", "sm_75")
WITH_PRODUCTS = ARCHITECTURES[:-1]
QUICK = ARCHITECTURES[:3]


def compiled_cases(*axes: Sequence[Any], share: int, quick: Callable[..., bool]) -> list[Any]:
    """What a test compiles, as its parameters: of all combinations every `share`-th, in slow tests, and the quick ones.

    All of them would take hours. The places of a combination's values in their axes add up to a multiple of `share`, so
    each value meets all values of another axis of that length, in one combination or another.

    Args:
        axes: values of each parameter.
        share: one in so many combinations is tested.
        quick: called with a combination: whether it is tested by quick tests too.
    """
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = tuple(axis[i] for axis, i in zip(axes, places, strict=True))
        if quick(*values):
            cases.append(pytest.param(*values))
        elif sum(places) % share == 0:
            cases.append(pytest.param(*values, marks=pytest.mark.slow))
    return cases


@contextlib.contextmanager
def running(device: str) -> Iterator[None]:
    """Run kernels on tensors of `device`, interpreted on a CPU. Uninitialized tensors are filled with NaN."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return poisoned

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poison(getattr(torch, name)))
        if device == "cpu":
            # Triton's library has jitted functions as well (tl.cdiv, tl.zeros ...).
            library = (triton.language, triton.language.standard)
            stack.enter_context(replaced_kernels(lambda kernel: InterpretedFunction(kernel.fn), *library))
            # The interpreter patches the language at every call and does not restore all of it, which breaks later
            # compilations. So it is patched once here, and restored.
            language = SimpleNamespace(tl=triton.language, core=triton.language.core)
            scope = interpreter._patch_lang(SimpleNamespace(__globals__=vars(language)))
            # Triton 3.6 relies on int(array of one element), which numpy 2.4 no longer allows.
            scope.set_attr(triton.language.tensor, "__index__", lambda it: int(it.handle.data.item()))
            stack.callback(scope.restore)
            patch.setattr(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None))
        yield


def random(*shape: int, seed: int) -> Tensor:
    """Normal random numbers, float64, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(result: Any) -> list[Tensor]:
    """The result of a launcher, a tensor or a tuple of them, as a list."""
    return list(result) if isinstance(result, tuple) else [result]


def rms(x: Tensor) -> float:
    """Root mean square; infinite for a NaN."""
    value = x.double().square().mean().sqrt().item() if x.numel() else 0.0
    return math.inf if math.isnan(value) else value


def assert_accurate(
    actual: Tensor, exact: Tensor, plain: Tensor, name: str, inputs: Iterable[object], floor: float = 0.0
) -> None:
    """Compare the root mean square error with that of plain PyTorch in the same dtype, both against float64.

    It may be twice as large, plus one rounding of the dtype. With few elements the error of plain PyTorch may be small
    by luck, and four roundings are allowed. If the exact result is zero up to the rounding of float64, the inputs give
    the scale, and eight roundings are allowed.

    Args:
        actual: the result to test.
        exact: the result in float64.
        plain: the result of plain PyTorch in the dtype of `actual`.
        name: for the message.
        inputs: the arguments of the op. The tensors among them give the scale of an exact result of zero.
        floor: smallest relative error to fail.
    """
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    if exact.numel():
        of_inputs = max((rms(x) for x in inputs if isinstance(x, Tensor)), default=0.0)
        is_zero = rms(exact) <= 1e-12 * of_inputs
        roundings = 8 if is_zero else 4 if exact.numel() < 100 else 1
        scale = of_inputs if is_zero else rms(exact)
        ours, theirs = rms(actual - exact) / (scale or 1.0), rms(plain - exact) / (scale or 1.0)
        limit = max(2 * theirs + torch.finfo(plain.dtype).eps * roundings, floor)
        assert ours <= limit, f"{name}: error {ours:.2e}, plain PyTorch {theirs:.2e}"


def assert_compiles_without_spills(
    architecture: str, launcher: Callable[[], Any], record: Callable[[str, object], None]
) -> None:
    """Every kernel that `launcher` launches compiles without a spill, within the memory of a program."""
    assert_launches_do_not_spill(architecture, record_launches(architecture, launcher), record)


def assert_launches_do_not_spill(
    architecture: str, launches: list[Launch], record: Callable[[str, object], None]
) -> None:
    assert launches
    wrong = []
    for it in launches:
        resources = compile_launch(it, architecture)
        record(f"{it.name} {architecture}", str(resources))
        if not resources.fits(architecture):
            wrong.append(f"{it.name}: {resources}")
    assert not wrong, f"{architecture}: {'; '.join(wrong)}"
