"""Triton kernels where there is no GPU: interpreted on CPU tensors, and compiled ahead of time.

The launchers themselves are called in both cases. To interpret, the kernels they reach for are swapped for interpreted
ones; to compile, for recorders, and the launchers get tensors on the meta device: what they would have launched on a
GPU is compiled just so, for tensors of any size.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
import fastgan.kernels
from fastgan.kernels import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# Shared memory that one program may have, in bytes (CUDA C++ programming guide, table of compute capabilities).
# "default" is what sm_86, sm_89 and sm_120 have, and is compiled for sm_86.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "default": 99 * 1024}
# Tensor memory, of sm_100 alone, in columns.
TENSOR = 512

# Interpreted on the CPU, or on the GPU: the same test. Interpreted bfloat16 is silently wrong, so it is a GPU's alone.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cpu", torch.float16, id="cpu-float16"),
    pytest.param("cuda", torch.float32, id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
]


def _kernel_modules() -> list[Any]:
    names = [it.name for it in pkgutil.iter_modules(fastgan.kernels.__path__)]
    return [importlib.import_module(f"fastgan.kernels.{name}") for name in names]


@contextlib.contextmanager
def _swapped(swap: Callable[[JITFunction], Any], *more: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (*_kernel_modules(), *more):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, swap(value))
        yield


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
            stack.enter_context(_swapped(lambda kernel: InterpretedFunction(kernel.fn), *library))
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


def check(actual: Tensor, exact: Tensor, plain: Tensor, name: str) -> None:
    """The error against float64 is at most twice that of plain PyTorch in the same dtype.

    Beyond that the dtype's rounding is allowed, where plain PyTorch happens to be exact; of zeros, eight of it.
    """
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    if exact.numel():
        ours, theirs = relative_rms(actual, exact), relative_rms(plain, exact)
        limit = 2 * theirs + torch.finfo(plain.dtype).eps * (1 if exact.any() else 8)
        assert ours <= limit, f"{name}: error {ours:.2e}, plain PyTorch {theirs:.2e}"


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[0] > 0 and grid[0] < 2**31 and all(0 < it < 2**16 for it in grid[1:]), grid

        def record(*args: Any, **kwargs: Any) -> None:
            self.launches.append(
                Launch(self.kernel, {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs})
            )

        return record


def launches(architecture: str, launcher: Callable[[], Any]) -> list[Launch]:
    """What `launcher`, called with meta tensors, would launch on a GPU of that architecture."""
    recorded: list[Launch] = []
    with _swapped(lambda kernel: _Recorder(kernel, recorded)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "architecture", lambda device: architecture)
        launcher()
    return recorded


@dataclass(frozen=True)
class Resources:
    registers: int
    shared: int
    local: int  # bytes of a thread in local memory: what was spilled
    tensor: int  # columns of tensor memory

    def fits(self, architecture: str) -> bool:
        return not self.local and self.shared <= SHARED[architecture] and self.tensor <= TENSOR

    def __str__(self) -> str:
        tensor = f", {self.tensor} columns of tensor memory" if self.tensor else ""
        return f"{self.registers} registers, {self.shared} bytes shared, {self.local} bytes spilled{tensor}"


_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


def compiled(launch: Launch, architecture: str) -> Resources:
    """Compile a launch as it would be compiled just in time: multiples of 16 are marked, 1 and None are constants."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(it, (*path, i)) for i, it in enumerate(value))
        if isinstance(value, Tensor):
            if value.data_ptr() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPES[value.dtype]
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, int):
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        assert isinstance(value, float)
        return "fp32"

    signature = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(place,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = kind(value, (place,))
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    capability = 86 if architecture == "default" else int(architecture.removeprefix("sm_"))
    options = {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    tensor = getattr(binary.metadata, "tmem_size", None) or 0
    return Resources(usage["REG"], binary.metadata.shared, usage["STACK"] + usage["LOCAL"], tensor)


def check_resources(architecture: str, launcher: Callable[[], Any], record: Callable[[str, object], None]) -> None:
    """Every kernel that `launcher` launches compiles without a spill, within the memory that a program has."""
    found = launches(architecture, launcher)
    assert found
    wrong = []
    for it in found:
        resources = compiled(it, architecture)
        record(f"{it.name} {architecture}", str(resources))
        if not resources.fits(architecture):
            wrong.append(f"{it.name}: {resources}")
    assert not wrong, f"{architecture}: {'; '.join(wrong)}"
