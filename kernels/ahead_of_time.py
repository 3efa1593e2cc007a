"""Resources that a kernel launch needs of a GPU, found by compiling it ahead of time, without a GPU.

A launcher of this package is called with tensors on the meta device, of any size, while its kernels are replaced by
recorders. The recorded launches are then compiled as Triton would compile them just in time.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fastgan.kernels

from . import tiles

# Maximum shared memory of a program in bytes (CUDA C++ programming guide, table of compute capabilities). "default" is
# that of sm_86, sm_89 and sm_120, and is compiled for sm_86.
SHARED_MEMORY = {
    "sm_75": 64 * 1024, "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024,
    "sm_100": 227 * 1024, "sm_120": 99 * 1024, "default": 99 * 1024,
}  # fmt: skip
# Those that kernels of matrix products are compiled for; sm_75 runs the others.
WITH_PRODUCTS = tuple(name for name in SHARED_MEMORY if name != "sm_75")
# Tensor memory in columns; only sm_100 has it.
TENSOR_MEMORY = 512


@contextlib.contextmanager
def replaced_kernels(replace: Callable[[JITFunction], Any], *more: Any) -> Iterator[None]:
    """Inside the context, replace every kernel in the modules of this package, and in `more`, by `replace(kernel)`."""
    names = [it.name for it in pkgutil.iter_modules(fastgan.kernels.__path__)]
    modules = [importlib.import_module(f"fastgan.kernels.{name}") for name in names]
    with contextlib.ExitStack() as stack:
        for module in (*modules, *more):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(patch.object(module, name, replace(value)))
        yield


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of one launch."""

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
            arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}
            self.launches.append(Launch(self.kernel, arguments))

        return record


def record_launches(architecture: str, launcher: Callable[[], Any]) -> list[Launch]:
    """The launches of `launcher`, which is called with meta tensors, on a GPU of that architecture."""
    recorded: list[Launch] = []
    as_architecture = patch.object(tiles, "architecture", lambda device: architecture)
    with replaced_kernels(lambda kernel: _Recorder(kernel, recorded)), as_architecture:
        launcher()
    return recorded


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: registers per thread.
        shared: shared memory per program, in bytes.
        spilled: local memory per thread, in bytes.
        tensor_columns: tensor memory per program, in columns.
    """

    registers: int
    shared: int
    spilled: int
    tensor_columns: int

    def fits(self, architecture: str) -> bool:
        """Whether the kernel spills nothing and stays within the memory of a program."""
        return not self.spilled and self.shared <= SHARED_MEMORY[architecture] and self.tensor_columns <= TENSOR_MEMORY

    def __str__(self) -> str:
        tensor = f", {self.tensor_columns} columns of tensor memory" if self.tensor_columns else ""
        return f"{self.registers} registers, {self.shared} bytes shared, {self.spilled} bytes spilled{tensor}"


_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


def compile_launch(launch: Launch, architecture: str) -> Resources:
    """Compile a launch as Triton would just in time: multiples of 16 are marked as such, 1 and None are constants."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        parameter = launch.kernel.params[path[0]]
        if isinstance(value, tuple):
            return tuple(type_of(it, (*path, i)) for i, it in enumerate(value))
        if isinstance(value, Tensor):
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPES[value.dtype]
        if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, int):
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        assert isinstance(value, float)
        return "fp32"

    signature = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(position,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = type_of(value, (position,))
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    capability = 86 if architecture == "default" else int(architecture.removeprefix("sm_"))
    options = {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    tensor = getattr(binary.metadata, "tmem_size", None) or 0
    return Resources(usage["REG"], binary.metadata.shared, usage["STACK"] + usage["LOCAL"], tensor)
