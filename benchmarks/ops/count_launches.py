"""How many operations a training step launches on a GPU, counted without one; with and without kernels for its noise.

    python -m benchmarks.ops.count_launches [VARIANT] [PX ...]

A step of the variant's paper preset runs on the meta device with the Triton forms of its ops. An operation of torch
that makes new values counts one (a few, such as a sum over all, are two kernels; optimizers are not counted), and so
does a launch of Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ops.count_specializations import Step, steps, triton_on_meta
from fastgan.kernels import counter_rng as counter_rng_kernels
from fastgan.kernels.ahead_of_time import record_launches
from fastgan.utils import counter_rng

_NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")


class _Operations(TorchDispatchMode):
    """Counts the operations that write something, but optimizers'."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        is_view = any(it.alias_info is not None and not it.alias_info.is_write for it in func._schema.returns)
        self.count += not (is_view or name in _NO_LAUNCH or name.startswith("_foreach"))
        return func(*args, **(kwargs or {}))


class Launches(NamedTuple):
    """Of one step: all, those of random numbers, and draws of these."""

    all: int
    noise: int
    draws: int


def count(step: Step, kernels: bool) -> Launches:
    """Launches of a step, with random numbers drawn by kernels or by torch's operations."""
    operations, draw, noise = _Operations(), counter_rng._draw, []

    def drawn(*arguments: Any) -> Tensor:
        before = operations.count
        numbers = draw(*arguments)
        noise.append(operations.count - before)
        return numbers

    with triton_on_meta(), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(counter_rng, "_draw", drawn))
        if not kernels:
            stack.enter_context(mock.patch.object(counter_rng, "_kernels", lambda index: None))
        stack.enter_context(operations)
        launches = record_launches("sm_90", step.run)
    of_noise = sum(it.kernel.fn.__module__ == counter_rng_kernels.__name__ for it in launches)
    return Launches(operations.count + len(launches), sum(noise) + of_noise, len(noise))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", nargs="?", default="pggan")
    parser.add_argument("resolutions", nargs="*", type=int, metavar="PX", help="all of the preset's by default")
    args = parser.parse_args(argv)
    print(f"{args.variant}, launches of a step       all   of its noise       all   of its noise, in kernels")
    for step in steps(args.variant):
        if args.resolutions and step.resolution not in args.resolutions:
            continue
        step.run()  # what happens once
        before, after = count(step, kernels=False), count(step, kernels=True)
        name = f"{step.resolution} px{', fading' if step.alpha < 1 else ''}"
        row = (before.all, before.noise, after.all, after.noise)
        print(f"{name:28}" + "".join(f"{it:10}" for it in row) + f"   {after.draws} draws", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
