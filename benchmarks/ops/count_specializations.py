"""How many kernels Triton compiles for the steps of a run, counted without a GPU; and a cache of them to carry.

    python -m benchmarks.ops.count_specializations [VARIANT ...] [--fill FOLDER] [--architecture sm_90]

One step of every resolution of a variant's paper preset, fading in and not, runs on the meta device in float32, with
the Triton forms of all ops but the scaled convolutions, which are not the default. The launches are recorded, and those
that Triton would compile as one kernel are counted as one: same constants, types, and divisibility by 16 of numbers.

--fill compiles each just in time, Triton's driver replaced by one that launches nothing, and says how long it took:
what a first start on a machine without a cache costs. FOLDER then is Triton's cache for a GPU of that architecture: a
run there under TRITON_CACHE_DIR=FOLDER with the same version of Triton compiles none of them. A second call with the
same FOLDER shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.gpu_pieces.steps import StepCase, config_of
from benchmarks.ops.launch_cost import without_gpu
from fastgan.config import batch_at
from fastgan.config.growth import stages_of
from fastgan.data import Batch
from fastgan.kernels import counter_rng as counter_rng_kernels
from fastgan.kernels.ahead_of_time import SHARED_MEMORY, Launch, record_launches
from fastgan.ops.dispatch.backend import OPS, Implementation
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.stage import ActiveStage
from fastgan.utils import counter_rng

META = torch.device("meta")


def specialization(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles one kernel for."""

    def of(value: Any, fixed: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(of(it, fixed) for it in value)
        if isinstance(value, Tensor):
            return value.dtype
        if isinstance(value, bool) or value is None or isinstance(value, float):
            return type(value)
        wide = not -(2**31) <= value < 2**31
        return ("int", wide) if fixed else ("int", wide, value == 1, value % 16 == 0)

    parameters = {p.name: p for p in launch.kernel.params if not p.is_constexpr}
    return launch.name, *(
        (name, of(value, parameters[name].do_not_specialize) if name in parameters else value)
        for name, value in sorted(launch.arguments.items())
    )


@contextlib.contextmanager
def triton_on_meta() -> Iterator[None]:
    """Have ops and random numbers take their Triton forms on the meta device."""
    with contextlib.ExitStack() as stack:
        for op in OPS.values():
            forms: dict[str, Implementation] = {}
            for name, it in op.implementations.items():
                if name not in ("cuda", "cpp"):
                    forms[name] = it
            if "triton" in forms and op.name not in ("upsample_conv2d", "conv2d_downsample"):
                forms["triton"] = dataclasses.replace(forms["triton"], unsupported_reason=lambda *_, **__: None)
            stack.enter_context(mock.patch.dict(op._by_device, {"meta": list(forms.items())}))
        stack.enter_context(mock.patch.object(counter_rng, "_kernels", lambda index: counter_rng_kernels))
        yield


class Step(NamedTuple):
    """One step of a run.

    Attributes:
        resolution: its pixels.
        alpha: blend of the fade.
        run: takes it, on the meta device.
    """

    resolution: int
    alpha: float
    run: Callable[[], None]


def steps(variant: str) -> Iterator[Step]:
    """A step of every resolution of a variant's paper preset, fading in and not."""
    config = config_of(StepCase(variant, 64 if variant != "sagan" else 128, "fp32"), rehearse=False)
    for planned in stages_of(config):
        world = ProcessGroup(0, 1, META, "torch", "counting")
        with mock.patch("fastgan.training.stage.optimizer_factory", lambda *_, **__: torch.optim.SGD):
            stage = ActiveStage(
                config, world, planned.resolution, channels=3, num_classes=0,
                stragglers=StragglerDetector(world), meters=Meters(), groups={},
            )  # fmt: skip
        n = batch_at(config.schedule, planned.resolution)
        images = torch.empty(n, 3, planned.resolution, planned.resolution, device=META)
        batch = Batch(images, None, torch.empty(n, dtype=torch.int64, device=META))
        for alpha in (0.5, 1.0):
            stage.set_alpha(alpha)

            def run(stage: ActiveStage = stage, batch: Batch = batch) -> None:
                stage.generator_step(stage.discriminator_step([batch]))

            yield Step(planned.resolution, alpha, run)


class Filled(NamedTuple):
    """How many kernels were compiled, and how long that took: seconds of a core, ptxas' own among them."""

    kernels: int
    seconds: float


def fill(variant: str, folder: Path, architecture: str) -> Filled:
    """Compile into `folder` what the steps of a variant launch."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)  # Triton reads it when it looks for a kernel
    seconds, compile_one, before = 0.0, JITFunction._do_compile, len(list(folder.glob("*/*.cubin")))

    def timed(*arguments: Any) -> Any:
        nonlocal seconds
        began = sum(os.times()[:4])
        kernel = compile_one(*arguments)
        seconds += sum(os.times()[:4]) - began
        return kernel

    with triton_on_meta(), without_gpu(architecture), mock.patch.object(JITFunction, "_do_compile", timed):
        for step in steps(variant):
            step.run()
    return Filled(len(list(folder.glob("*/*.cubin"))) - before, seconds)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", default=["pggan", "wgan-gp", "sagan"])
    parser.add_argument("--fill", type=Path, metavar="FOLDER", help="compile them into this folder, and say how long")
    parser.add_argument("--architecture", choices=[it for it in SHARED_MEMORY if it != "default"], default="sm_90")
    args = parser.parse_args(argv)
    for variant in args.variants:
        with triton_on_meta():
            recorded = [it for step in steps(variant) for it in record_launches(args.architecture, step.run)]
        different = {specialization(launch): launch for launch in recorded}
        names = Counter(launch.name for launch in different.values())
        print(f"{variant}: {len(recorded)} launches, {len(different)} kernels: {dict(names)}", flush=True)
        if args.fill is not None:
            found = fill(variant, args.fill.resolve(), args.architecture)
            print(f"{variant}: {found.kernels} compiled into {args.fill}, {found.seconds:.1f} s of a core", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
