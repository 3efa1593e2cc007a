"""Piece 2: whole training steps: host, device, memory, and no synchronization in them. Piece 7: larger batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_pieces.context import Context, host_ms, profile, step_ms
from fastgan.config import Config, Precision, batch_at, replace
from fastgan.config.variants import VARIANTS
from fastgan.data import Batch
from fastgan.training import torch_settings
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.stage import ActiveStage

WARM_UP = 3


class StepCase(NamedTuple):
    """A step of a variant's paper preset; `batch` None: that of the preset."""

    variant: str
    resolution: int
    precision: Precision
    batch: int | None = None

    def __str__(self) -> str:
        batch = "" if self.batch is None else f" batch {self.batch}"
        return f"{self.variant} {self.resolution} px {self.precision}{batch}"


# The most telling first: what is cut comes in the next call.
CASES = [
    *(StepCase("pggan", px, "bf16") for px in (1024, 64, 4)),
    *(StepCase("wgan-gp", 64, precision) for precision in ("bf16", "fp32")),
    *(StepCase("pggan", px, "tf32") for px in (1024, 64, 4)),
    StepCase("pggan", 256, "bf16"),
    StepCase("sagan", 128, "bf16"),
    *(StepCase("pggan", px, "fp32") for px in (1024, 64, 4)),
    *(StepCase("pggan", 256, precision) for precision in ("tf32", "fp32")),
    *(StepCase("sagan", 128, precision) for precision in ("tf32", "fp32")),
    StepCase("wgan-gp", 64, "tf32"),
]
REHEARSED = [StepCase("pggan", 8, "bf16", 4), StepCase("wgan-gp", 8, "tf32", 4), StepCase("sagan", 8, "fp32", 4)]
_SMALL = {
    "pggan": {"latent": 8, "fmap_base": 32, "fmap_max": 8},
    "wgan-gp": {"latent": 8, "width": 8, "max_width": 8},
    "sagan": {"latent": 8, "width": 8, "max_width": 8},
}


def config_of(case: StepCase, rehearse: bool) -> Config:
    config = VARIANTS[case.variant].config("paper")
    schedule: dict[str, Any] = {} if case.variant == "pggan" and not rehearse else {"resolution": case.resolution}
    if case.batch is not None:
        schedule |= {"batch": case.batch, "batch_at": {}}
    networks = _SMALL[case.variant] if rehearse else {}
    return replace(config, schedule=schedule, networks=networks, system={"precision": case.precision, "qualify": False})


def stage_of(case: StepCase, context: Context) -> ActiveStage:
    """The trainer's own stage, with everything that training sets in torch."""
    config = config_of(case, context.rehearse)
    torch_settings.apply(config)
    torch_settings.allow_tf32(case.precision == "tf32")
    world = ProcessGroup(0, 1, context.device, "torch", "measuring")
    stage = ActiveStage(
        config, world, case.resolution, channels=3, num_classes=0,
        stragglers=StragglerDetector(world), meters=Meters(), groups={},
    )  # fmt: skip
    stage.set_alpha(1.0)
    return stage


def batches_of(stage: ActiveStage) -> list[Batch]:
    """The micro-batches of one step, of noise."""
    s, device = stage.config.schedule, stage.world.device
    micro = batch_at(s, stage.resolution) // s.accumulation
    count = stage.config.optimizer.n_critic * s.accumulation
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(micro, 3, stage.resolution, stage.resolution, generator=generator) * 2 - 1
    return [
        Batch(images.to(device), None, torch.arange(i * micro, (i + 1) * micro, device=device)) for i in range(count)
    ]


def step_of(stage: ActiveStage) -> Callable[[], None]:
    """One whole step: the discriminator's, as many as the preset has, and the generator's."""
    batches, accumulation = batches_of(stage), stage.config.schedule.accumulation

    def step() -> None:
        for i in range(0, len(batches), accumulation):
            taken = stage.discriminator_step(batches[i : i + accumulation], generator_first=i > 0)
        stage.generator_step(taken)

    return step


@contextmanager
def synchronization_is_an_error(device: torch.device) -> Iterator[None]:
    """Have torch raise where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def repeats_for(milliseconds: float, rehearse: bool) -> int:
    """Steps that take about a second."""
    return 1 if rehearse else max(3, min(50, round(1000 / max(milliseconds, 1.0))))


def measure(case: StepCase, context: Context) -> dict[str, Any]:
    device = context.device
    step = step_of(stage_of(case, context))
    for _ in range(1 if context.rehearse else WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = step_ms(step, device, 1)
    repeats = repeats_for(first, context.rehearse)
    try:
        with synchronization_is_an_error(device):
            step()
    except RuntimeError as error:
        context.row(f"{case}: synchronizes", {"fault": str(error).splitlines()[0]})
    whole, host = step_ms(step, device, repeats), host_ms(step, device, min(repeats, 5))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    kernels = profile(step, device) if device.type == "cuda" else []
    config = config_of(case, context.rehearse)
    batch = batch_at(config.schedule, case.resolution)
    return {
        **case._asdict(),
        "batch": batch,
        "step_ms": whole,
        "host_ms": host,
        "device_ms": sum(us for _, _, us in kernels) / 1e3 if kernels else None,
        "launches": sum(count for _, count, _ in kernels) if kernels else None,
        "images_per_second": 1e3 * batch * config.optimizer.n_critic / whole,
        "peak_gb": peak,
    }


def run(context: Context) -> None:
    for case in REHEARSED if context.rehearse else CASES:
        context.attempt(str(case), lambda case=case: measure(case, context))  # type: ignore[misc]


def run_larger_batches(context: Context) -> None:
    """Piece 7: how far a larger batch at 1024 px fills the device, until memory ends."""
    batches = (2, 4) if context.rehearse else (8, 16, 32, 64)
    for batch in batches:
        case = StepCase("pggan", 8 if context.rehearse else 1024, "bf16", batch)

        def attempt(case: StepCase = case) -> dict[str, Any]:
            try:
                return measure(case, context)
            except torch.OutOfMemoryError:
                return {**case._asdict(), "out_of_memory": True}

        context.attempt(str(case), attempt)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
