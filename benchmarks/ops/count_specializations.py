"""How many kernels Triton compiles for the steps of a run, counted without a GPU.

    python -m benchmarks.ops.count_specializations [VARIANT ...] [--compile]

One step of every resolution of a variant's paper preset, fading in and not, runs on the meta device in float32, with
the Triton forms of all ops but the scaled convolutions, which are not the default. The launches are recorded, and those
that Triton would compile as one kernel are counted as one: same constants, types, and divisibility by 16 of numbers.
--compile compiles each for sm_90, in one process, and says how long it took: what a
first start on a machine without a cache costs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_pieces.steps import StepCase, config_of
from fastgan.config import batch_at
from fastgan.config.growth import stages_of
from fastgan.data import Batch
from fastgan.kernels.ahead_of_time import Launch, compile_launch, record_launches
from fastgan.ops.dispatch.backend import OPS, Implementation
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.stage import ActiveStage

META = torch.device("meta")


def specialization(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles one kernel for."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if isinstance(value, Tensor):
            return value.dtype
        if isinstance(value, bool) or value is None or isinstance(value, float):
            return type(value)
        return ("int", value == 1, value % 16 == 0, -(2**31) <= value < 2**31)

    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    return launch.name, *(
        (name, value if name in constants or name not in launch.kernel.arg_names else of(value))
        for name, value in sorted(launch.arguments.items())
    )


@contextlib.contextmanager
def triton_on_meta() -> Iterator[None]:
    """Have ops take their Triton forms on the meta device."""
    with contextlib.ExitStack() as stack:
        for op in OPS.values():
            forms: dict[str, Implementation] = {}
            for name, it in op.implementations.items():
                if name not in ("cuda", "cpp"):
                    forms[name] = it
            if "triton" in forms and op.name not in ("upsample_conv2d", "conv2d_downsample"):
                forms["triton"] = dataclasses.replace(forms["triton"], unsupported_reason=lambda *_, **__: None)
            stack.enter_context(mock.patch.dict(op._by_device, {"meta": list(forms.items())}))
        yield


def launches(variant: str) -> list[Launch]:
    """Those of all steps of a run that differ."""
    config = config_of(StepCase(variant, 64 if variant != "sagan" else 128, "fp32"), rehearse=False)
    found: list[Launch] = []
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

            def step(stage: ActiveStage = stage, batch: Batch = batch) -> None:
                stage.generator_step(stage.discriminator_step([batch]))

            found += record_launches("sm_90", step)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", default=["pggan", "wgan-gp", "sagan"])
    parser.add_argument("--compile", action="store_true", help="compile them, and say how long it took")
    args = parser.parse_args(argv)
    for variant in args.variants:
        with triton_on_meta():
            recorded = launches(variant)
        different = {specialization(launch): launch for launch in recorded}
        names = Counter(launch.name for launch in different.values())
        print(f"{variant}: {len(recorded)} launches, {len(different)} kernels: {dict(names)}", flush=True)
        if args.compile:
            began = time.perf_counter()
            for launch in different.values():
                compile_launch(launch, "sm_90")
            print(f"{variant}: compiled in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
