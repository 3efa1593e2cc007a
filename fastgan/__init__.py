"""fastgan: kernels and distributed training for generative adversarial networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from typing import Any

    from torch import Tensor

    from fastgan.compiled.step import CompiledStep
    from fastgan.generator import TrainedGenerator

__all__ = ["__version__", "compile_step", "configure_process", "load"]
__version__ = "0.2.0"


def load(path: str | Path, device: str = "cpu") -> TrainedGenerator:
    """The generator of a run or an exported file, as in `fastgan.load("RUN").sample(16)`: `fastgan.generator.load`."""
    from fastgan.generator import load

    return load(path, device)


def compile_step(
    loss_fn: Callable[..., Any], parameters: Iterable[Tensor], *, has_aux: bool = False, compile: bool = True
) -> CompiledStep:
    """Loss and gradients of `loss_fn`, gradient penalties included, as a program: `fastgan.compiled.step`."""
    from fastgan.compiled import step

    return step.compile_step(loss_fn, parameters, has_aux=has_aux, compile=compile)


def configure_process() -> dict[str, str]:
    """Before torch is imported: memory that is kept, threads that do not spin; `fastgan.utils.process` has it."""
    from fastgan.utils.process import configure_process

    return configure_process()
