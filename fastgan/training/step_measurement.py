"""Times of single steps on one rank: measured here, or read from a file that was measured elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fastgan.config import Config, replace, to_dict
from fastgan.data import Batch, open_source
from fastgan.errors import ArgumentError
from fastgan.models.pggan import Progressive
from fastgan.planning.communication import NetworkTime, pack
from fastgan.training.distributed.engine import Engine
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.trainer import Trainer
from fastgan.utils.old_names import current_names
from fastgan.utils.timers import Marks

SCHEMA = 1
# Gradients are noted in pieces of this many bytes: far below a bucket, and few.
_SMALLEST = 2**20


@dataclass(frozen=True)
class Timing:
    """One measured step: which, and how long the discriminator's and the generator's part take."""

    resolution: int
    micro: int
    fading: bool
    d: NetworkTime
    g: NetworkTime


@dataclass(frozen=True)
class StepTimes:
    """What was measured, on what.

    recipe: the settings that decide how long a step takes, besides resolution and batch.
    """

    schema: int
    device: str
    torch: str
    recipe: dict[str, Any]
    timings: list[Timing]

    def at(self, resolution: int, micro: int, fading: bool) -> tuple[Timing, str] | None:
        """The timing of a micro-batch, and how it came about: "" if measured; None if there is none to go by.

        Between two measured micro-batches the time is taken as linear, and beyond them along the nearest two.
        """
        known = sorted(
            (t for t in self.timings if t.resolution == resolution and t.fading == fading), key=lambda t: t.micro
        )
        if not known:
            return None
        exact = next((t for t in known if t.micro == micro), None)
        if exact is not None:
            return exact, ""
        if len(known) == 1:
            factor = micro / known[0].micro
            d, g = known[0].d.scaled(factor), known[0].g.scaled(factor)
            return Timing(resolution, micro, fading, d, g), f"in proportion from {known[0].micro} per rank"
        upper = next((i for i, t in enumerate(known) if t.micro > micro), len(known) - 1)
        low, high = known[max(upper, 1) - 1], known[max(upper, 1)]
        along = (micro - low.micro) / (high.micro - low.micro)
        d, g = (_between(a, b, along) for a, b in ((low.d, high.d), (low.g, high.g)))
        return Timing(resolution, micro, fading, d, g), f"on a line through {low.micro} and {high.micro} per rank"


def _between(a: NetworkTime, b: NetworkTime, along: float) -> NetworkTime:
    seconds = max(a.seconds + along * (b.seconds - a.seconds), 0.0)
    # The shape of the backward is that of the nearer one.
    return nearer.scaled(seconds / nearer.seconds) if (nearer := a if along < 0.5 else b).seconds else nearer


def recipe(config: Config, channels: int) -> dict[str, Any]:
    """The settings that a step's time depends on."""
    system = config.system
    return {
        **to_dict(config)["networks"],
        "loss": config.objective.loss,
        "regularizer": config.objective.regularizer,
        "optimizer": config.optimizer.optimizer,
        "channels": channels,
        "precision": system.precision,
        "penalty_precision": system.penalty_precision,
        "tf32": system.tf32,
        "deterministic": system.deterministic,
        "memory_format": system.memory_format,
    }


_ADAPTER = TypeAdapter(StepTimes)


def read(path: str, wanted: dict[str, Any]) -> StepTimes:
    """Step times from a file.

    Raises:
        ArgumentError: it cannot be read, is no such file, or was measured with another recipe than `wanted`.
    """
    flag = "--step-times"
    try:
        times = _ADAPTER.validate_json(Path(path).read_bytes())
        times = dataclasses.replace(times, recipe=current_names(times.recipe))
    except OSError as error:
        raise ArgumentError(flag, path, f"must be a file of --write-step-times ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ArgumentError(
            flag, path, f"must be a file of --write-step-times ({where}: {first['msg'].lower()})"
        ) from None
    if times.schema != SCHEMA:
        raise ArgumentError(flag, path, f"it has schema {times.schema}; this version reads {SCHEMA}")
    for key, value in wanted.items():
        if times.recipe.get(key) != value:
            raise ArgumentError(
                flag, path, f"it was measured with {key} {times.recipe.get(key)}, and the run has {value}"
            )
    if not times.timings:
        raise ArgumentError(flag, path, "it has no timing")
    return times


def write(times: StepTimes, path: str) -> None:
    """Replace `path` whole, or not at all.

    Raises:
        ArgumentError: it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.write_text(json.dumps(asdict(times), indent=1) + "\n")
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ArgumentError(
            "--write-step-times", path, f"must be a file that can be written ({error.strerror})"
        ) from None


def writable(path: str) -> None:
    """Refuse, before anything is measured, a file that could not be written after it."""
    target = Path(path)
    if target.is_dir() or not target.absolute().parent.is_dir() or not os.access(target.absolute().parent, os.W_OK):
        raise ArgumentError("--write-step-times", path, "must be a file in a folder that is there and can be written")


def free_bytes(device: torch.device) -> float:
    """Memory that may still be taken on `device`; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


class _Still:
    """In place of a pipeline: the same random images at every step."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def set_resolution(self, resolution: int) -> None: ...

    def batch(self, start: int, size: int, *, rank: int, world: int) -> Batch:
        return self._batch


@contextlib.contextmanager
def _first_use(module: nn.Module, marks: Marks) -> Iterator[list[int]]:
    """When `module` was called inside, the first time first."""
    found: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: found.append(marks()))
    try:
        yield found
    finally:
        handle.remove()


class _Watched:
    """An engine that notes when each gradient is there and when the backward ends."""

    def __init__(self, engine: Engine, marks: Marks) -> None:
        self._engine, self._marks = engine, marks
        self.module, self.memory_format = engine.module, engine.memory_format
        self.ready: list[tuple[int, int]] = []
        self.end = 0
        self._handles = [
            p.register_post_accumulate_grad_hook(self._note) for p in self.module.parameters() if p.requires_grad
        ]

    def _note(self, parameter: Tensor) -> None:
        self.ready.append((parameter.numel() * parameter.element_size(), self._marks()))

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self.end = self._marks()

    def step(self) -> None:
        self._engine.step()

    def wait(self) -> None:
        self._engine.wait()

    def set_rate(self, rate: float) -> None:
        self._engine.set_rate(rate)

    def state(self) -> dict[str, Tensor]:
        return self._engine.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._engine.load_state(state)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def gradients(self) -> tuple[tuple[int, float], ...]:
        """As for `scaling.reduction_seconds`, small ones together; those that never came are sent at the end."""
        groups = pack([size for size, _ in self.ready], _SMALLEST)
        found = [
            (sum(self.ready[i][0] for i in group), self._marks.seconds(self.ready[group[-1]][1], self.end))
            for group in groups
        ]
        missing = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
        missing -= sum(size for size, _ in found)
        return (*found, (missing, 0.0)) if missing else tuple(found)


class Bench:
    """Runs steps of a run's stages on one rank, through the trainer's own code.

    seconds: about how long each measurement may take, after one step that is not counted; at least one is.
    """

    def __init__(self, config: Config, variant: str, device: torch.device, channels: int, seconds: float) -> None:
        config = replace(
            config,
            data={"data": "synthetic", "channels": channels, "pipeline": "auto", "mirror": False},
            schedule={"accumulation": 1},
            run={"evaluate_kimg": None},
        )
        self._world = ProcessGroup(0, 1, device, "torch", "measuring")
        self._config, self._variant, self._seconds = config, variant, seconds
        self._source = open_source("synthetic", config.schedule.resolution, channels)

    def time(self, resolution: int, micro: int, fading: bool) -> Timing:
        """Median times of a step on `micro` images at `resolution`.

        Raises:
            torch.OutOfMemoryError: a GPU has too little memory.
        """
        device = self._world.device
        config = replace(self._config, schedule={"batch": micro, "batch_at": {}})
        trainer = Trainer(config, self._variant, self._world, self._source, Path())
        trainer.pipeline.close()
        images = torch.rand(micro, self._source.channels, resolution, resolution, device=device) * 2 - 1
        labels = torch.arange(micro, device=device) % max(self._source.num_classes, 1)
        trainer.pipeline = _Still(Batch(images, labels, torch.arange(micro, device=device)))  # type: ignore[assignment]
        trainer._enter(resolution)
        for module in trainer._modules():
            if isinstance(module, Progressive):
                module.set_alpha(0.5 if fading else 1.0)
        self._step(trainer, micro)
        taken: list[tuple[float, ...]] = []
        while not taken or (sum(d + g for d, g, *_ in taken) < self._seconds and len(taken) < 50):
            taken.append(self._step(trainer, micro))
        assert trainer._engines is not None
        watched = tuple(_Watched(engine, Marks(device)) for engine in trainer._engines)
        trainer._engines = (watched[0], watched[1])
        self._step(trainer, micro)
        g, d = (watcher.gradients() for watcher in watched)
        trainer._close_engines()
        # Trainer, engines and hooks refer to each other: at 1024 px nothing else may stay in memory.
        gc.collect()
        time_d, time_g, lead_d, lead_g = (statistics.median(part) for part in zip(*taken, strict=True))
        return Timing(resolution, micro, fading, NetworkTime(time_d, d, lead_d), NetworkTime(time_g, g, lead_g))

    @staticmethod
    def _step(trainer: Trainer, micro: int) -> tuple[float, ...]:
        """Seconds of one step of the discriminator and of one of the generator, and their leads."""
        marks = Marks(trainer.world.device)
        begun = marks()
        with _first_use(trainer.step.generator, marks) as generator:
            positions = trainer._discriminator_step(micro)
        between = marks()
        with _first_use(trainer.step.discriminator, marks) as discriminator:
            trainer._generator_step(positions)
        end = marks()
        spans = ((begun, between), (between, end), (begun, generator[0]), (between, discriminator[0]))
        return tuple(marks.seconds(a, b) for a, b in spans)
