"""Compiles a recorded graph to a file, and runs such files.

The compiler is TorchInductor ahead of time (AOTInductor): C++ on a CPU, Triton on a GPU, and one call from Python for
the whole graph. Files are kept in the user's cache, so that the next process loads them in milliseconds. They hold
machine code: fastgan loads them from that cache alone, as it does its own kernels, and never from anywhere else.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fastgan.ops.dispatch import extension
from fastgan.utils.system import cache_folder, device_name
from fastgan.utils.text import first_line

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


class CompileError(RuntimeError):
    """The graph could not be compiled on this machine; the message is the compiler's first line."""


def layout(x: Tensor) -> Layout:
    """What a program assumes of an input without looking: shape, strides, dtype, device."""
    # A dimension of one element addresses nothing by its stride, but a convolution decides by it whether its input is
    # channels_last, and so which strides its result has.
    return tuple(x.shape), x.stride(), x.dtype, x.device


def placed(x: Tensor, expected: Layout) -> Tensor:
    """`x`, or a copy of it with the strides that a program expects."""
    shape, strides, dtype, device = expected
    return x if x.stride() == strides else torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(x)


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for folder in (package, package.parent / "csrc"):
        for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp"), *folder.rglob("*.h")]):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Everything but the graph that a compiled program depends on, as plain values."""
    return {
        "fastgan": _source_hash(),
        "torch": torch.__version__,
        "system": [platform.system(), platform.machine()],
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        # Inductor's loops have the number of threads that torch had when it compiled them.
        "threads": torch.get_num_threads(),
    }


def key_of(facts: dict[str, Any]) -> str:
    """A name for what was compiled from `facts`, JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def file_of(key: str) -> Path:
    """Where the program `key` is in the user's cache, if it has been compiled."""
    return cache_folder("programs") / f"{key}.pt2"


@dataclass(frozen=True)
class Program:
    """A loaded program: call it with tensors of exactly the layouts that it was compiled for."""

    file: Path
    layouts: tuple[Layout, ...]
    _run: Any

    @classmethod
    def load(cls, file: Path, layouts: Sequence[Layout]) -> Program:
        """The program of `file`, which was compiled for these layouts.

        Raises:
            CompileError: the file cannot be loaded.
        """
        extension.cpu()  # a program may call its kernels
        # It warns of a CUDA toolkit without a GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            return cls(file, tuple(layouts), torch._inductor.aoti_load_package(str(file)))
        except Exception as error:  # torch raises RuntimeError, OSError or its own, by version
            raise CompileError(f"{file}: {first_line(error)}") from None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = self._run(*tensors)
        return [found] if isinstance(found, Tensor) else list(found)

    def mismatch(self, tensors: Sequence[Tensor]) -> int | None:
        """Index of the first tensor that has another layout than the program assumes, or None."""
        for i, (tensor, expected) in enumerate(zip(tensors, self.layouts, strict=True)):
            if layout(tensor) != expected:
                return i
        return None


_COUNTING = (torch.ops.aten.arange, torch.ops.aten.mul)


def _with_counters_computed(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph` in which multiples of counters are constants.

    Random numbers multiply a counter by a 64-bit constant and wrap around. Inductor takes the product for the index of
    an element, as it does any counter, and computes with it exactly: it fails, or the program is wrong.
    """
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    copy = fx.GraphModule(graph, nodes)
    computed: dict[fx.Node, Tensor] = {}
    for node in list(copy.graph.nodes):
        if getattr(node.target, "overloadpacket", None) in _COUNTING and all(
            n in computed for n in node.all_input_nodes
        ):
            arguments, options = fx.node.map_arg((node.args, node.kwargs), computed.__getitem__)
            computed[node] = node.target(*arguments, **options)
    for i, (node, value) in enumerate(computed.items()):
        if any(user not in computed for user in node.users) and value.dtype == torch.int64:
            copy.register_buffer(f"counter_{i}", value)
            with copy.graph.inserting_before(node):
                node.replace_all_uses_with(copy.graph.get_attr(f"counter_{i}"), lambda user: user not in computed)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[Tensor], file: Path, options: dict[str, Any] | None = None
) -> None:
    """Compile `graph` for inputs of these layouts into `file`, whole or not at all.

    Args:
        graph: of `recording.record`.
        inputs: of the graph; their values are not used.
        file: of the program.
        options: of Inductor, by the names of its configuration.

    Raises:
        CompileError: there is no compiler, the graph has something that it does not know, or the disk is full.
    """
    # aoti_compile_and_package is torch's documented entry to AOTInductor; the module that has it is not public.
    from torch import _inductor

    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".part-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad():
                exported = torch.export.export(
                    _with_counters_computed(graph), tuple(x.detach() for x in inputs), strict=False
                )
                package = str(Path(folder) / "program.pt2")
                _inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=options)
            os.replace(Path(folder) / "program.pt2", file)
    except Exception as error:  # whatever the compiler raises
        raise CompileError(f"{type(error).__name__}: {first_line(error)}") from error


def graph_facts(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """The graph and the layouts of its inputs, for `key_of`."""
    return {"graph": graph.code, "layouts": [str(layout(x)) for x in inputs]}


# A rectifier whose input rounds to the other side of zero changes a gradient by a finite amount: in small networks by
# some thousandths of its norm, in one step and not in the next. In a single step so much may be a kink.
_KINKS = 0.02
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def tolerance_of(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> float:
    """How far a program may be from the recorded operations, as `difference_of` measures it."""
    used = {x.dtype for x in inputs} | {dtype for dtype in _TOLERANCES if str(dtype) in graph.code}
    return max((_TOLERANCES[dtype] for dtype in used if dtype in _TOLERANCES), default=0.0)


def difference_of(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], smallest: float = 1e-6) -> float:
    """|found - expected| / max(|expected|, smallest) over all tensors together; infinite where it is not finite.

    Over all together, as a single gradient may be zero but for rounding: that of a bias before a batch norm.
    """
    difference = norm = 0.0
    for a, b in zip(found, expected, strict=True):
        if a is not None and b is not None and b.numel():
            difference += float((a.double() - b.double()).square().sum())
            norm += float(b.double().square().sum())
    ratio = difference**0.5 / max(norm**0.5, smallest)
    return ratio if ratio == ratio else float("inf")


def may_be_right(gradients: float, others: float, tolerance: float) -> bool:
    """Whether one step of a program may be right, by the differences of gradients and of everything else.

    Everything else is within the tolerance, and gradients are but for kinks.
    """
    return others <= tolerance and gradients <= max(5 * tolerance, _KINKS)
