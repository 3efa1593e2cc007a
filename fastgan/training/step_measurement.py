"""Measures single training steps on one rank, through the trainer's own stage."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.config import Config, replace
from fastgan.data import Batch
from fastgan.planning.cost_model import UpdateTime
from fastgan.planning.step_times import Timing
from fastgan.training.distributed.engine import Engine
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.stage import ActiveStage
from fastgan.utils.buckets import pack
from fastgan.utils.system import cpu_count
from fastgan.utils.timers import Marks

# Gradients are recorded in groups of this many bytes: far smaller than a bucket, and few.
_GROUP_BYTES = 2**20
_MAX_STEPS = 50
_CLASSES = 10  # of conditional networks
_MUCH = 0.25  # scatter that is reported


def free_bytes(device: torch.device) -> float:
    """Free memory of `device`; infinite where the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def scatter_of(seconds: list[float]) -> float:
    """Distance of the quartiles over the median: 0.1 where half of the times are within about 5% of it."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


def busy(scatters: Iterable[float], device: torch.device) -> str | None:
    """One line where other programs have disturbed measurements, or take cores that a run wants; else None.

    Args:
        scatters: `scatter_of` the steps of each measurement.
        device: where they ran.
    """
    scatter, cores = max(scatters, default=0.0), cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    # The load of the last minute has some tenths of this process; from one whole core on it is of others.
    crowded = device.type == "cpu" and load + torch.get_num_threads() > cores + 1
    if scatter <= _MUCH and not crowded:
        return None
    return (
        f"warning: this machine is busy, so times may be far off: measured steps scatter by {scatter:.0%}, the load is "
        f"{load:.1f} on {cores} cores; plan again when less runs, or with fewer --threads"
    )


@contextlib.contextmanager
def _calls_of(module: nn.Module, marks: Marks) -> Iterator[list[int]]:
    """Marks of the calls of `module` inside the context, in order."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(marks()))
    try:
        yield calls
    finally:
        handle.remove()


class _RecordingEngine:
    """An engine that records when each gradient becomes ready and when the backward pass ends."""

    def __init__(self, engine: Engine, marks: Marks) -> None:
        self._engine, self._marks = engine, marks
        self._ready: list[tuple[int, int]] = []  # (bytes, mark)
        self._end = 0
        self._handles = [
            p.register_post_accumulate_grad_hook(self._record) for p in engine.module.parameters() if p.requires_grad
        ]

    def _record(self, parameter: Tensor) -> None:
        self._ready.append((parameter.numel() * parameter.element_size(), self._marks()))

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._end = self._marks()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def gradients(self) -> tuple[tuple[int, float], ...]:
        """As in `UpdateTime`, in groups; gradients that were not computed count as ready at the end."""
        groups = pack([size for size, _ in self._ready], _GROUP_BYTES)
        ready = [
            (sum(self._ready[i][0] for i in group), self._marks.seconds(self._ready[group[-1]][1], self._end))
            for group in groups
        ]
        missing = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
        missing -= sum(size for size, _ in ready)
        return (*ready, (missing, 0.0)) if missing else tuple(ready)


class Bench:
    """Times steps of a run's stages on one rank, on random images.

    Args:
        config: configuration of the run.
        device: where the steps run.
        channels: of the images.
        seconds: approximate duration of each measurement. One step before it is not counted; at least one is.

    Attributes:
        scatters: `scatter_of` the steps of each measurement so far.
    """

    def __init__(self, config: Config, device: torch.device, channels: int, seconds: float) -> None:
        self._config = replace(config, schedule={"accumulation": 1})
        self._world = ProcessGroup(0, 1, device, "torch", "measuring")
        self._channels, self.seconds = channels, seconds
        self.scatters: list[float] = []

    def time(self, resolution: int, micro: int, fading: bool) -> Timing:
        """Median times of a step on `micro` images at `resolution`.

        Raises:
            MemoryError: the GPU has too little memory.
        """
        timing = None
        with contextlib.suppress(torch.OutOfMemoryError):
            timing = self._time(resolution, micro, fading)
        # Networks, engines and hooks form reference cycles. They must be freed before the next measurement.
        gc.collect()
        if timing is None:
            raise MemoryError(f"{micro} images of {resolution} px")
        return timing

    def _time(self, resolution: int, micro: int, fading: bool) -> Timing:
        stage = self._stage(resolution, micro, fading)
        device = self._world.device
        images = torch.rand(micro, self._channels, resolution, resolution, device=device) * 2 - 1
        positions = torch.arange(micro, device=device)
        batch = Batch(images, positions % _CLASSES, positions)
        self._step(stage, batch)
        spans: list[tuple[float, ...]] = []
        while not spans or (sum(d + g for d, g, *_ in spans) < self.seconds and len(spans) < _MAX_STEPS):
            spans.append(self._step(stage, batch))
        self.scatters.append(scatter_of([d + g for d, g, *_ in spans]))
        d, g, lead_d, lead_g = (statistics.median(span) for span in zip(*spans, strict=True))
        gradients_d, gradients_g = self._gradients(stage, batch)
        return Timing(resolution, micro, fading, UpdateTime(d, gradients_d, lead_d), UpdateTime(g, gradients_g, lead_g))

    def _stage(self, resolution: int, micro: int, fading: bool) -> ActiveStage:
        """The stage of `resolution` with batches of `micro` images."""
        stage = ActiveStage(
            replace(self._config, schedule={"batch": micro, "batch_at": {}}),
            self._world,
            resolution,
            channels=self._channels,
            num_classes=_CLASSES,
            stragglers=StragglerDetector(self._world),
            meters=Meters(),
            groups={},
        )
        stage.set_alpha(0.5 if fading else 1.0)
        return stage

    @staticmethod
    def _step(stage: ActiveStage, batch: Batch) -> tuple[float, ...]:
        """Seconds of a discriminator update and of a generator update, and the lead of each (see `UpdateTime`)."""
        marks = Marks(stage.world.device)
        start = marks()
        with _calls_of(stage.step.generator, marks) as generator:
            positions = stage.discriminator_step([batch])
        middle = marks()
        if stage.step.penalty is not None and stage.step.penalty_every > 1:
            stage.penalty_step([batch])
        penalized = marks()
        with _calls_of(stage.step.discriminator, marks) as discriminator:
            stage.generator_step(positions)
        end = marks()
        spans = ((start, middle), (penalized, end), (start, generator[0]), (penalized, discriminator[0]))
        d, *rest = (marks.seconds(a, b) for a, b in spans)
        return d + marks.seconds(middle, penalized) / stage.step.penalty_every, *rest

    def _gradients(self, stage: ActiveStage, batch: Batch) -> list[tuple[tuple[int, float], ...]]:
        """When the gradients of the discriminator and of the generator become ready, in one more step; the last one."""
        generator, discriminator = (_RecordingEngine(engine, Marks(self._world.device)) for engine in stage.engines)
        stage.generator_engine, stage.discriminator_engine = generator, discriminator
        self._step(stage, batch)
        gradients = [discriminator.gradients(), generator.gradients()]
        stage.close()
        return gradients
