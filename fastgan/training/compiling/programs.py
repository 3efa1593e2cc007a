"""The programs of a stage: what they depend on, how they are compiled and checked, and how they are bound to networks.

They are recorded on networks of their own, built from the configuration alone, so that another process can compile
them ahead. Files in the user's cache are named by everything that they depend on.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgan.compiled.program import CompileError, Program, file_of, key_of, layout, machine_facts, placed
from fastgan.compiled.recording import Holder
from fastgan.config import Config
from fastgan.config.rules import SECOND_ORDER
from fastgan.ops import qualification
from fastgan.training.compiling.micro_step import MicroStep, unflat
from fastgan.training.from_config import memory_format
from fastgan.training.step import Step
from fastgan.utils.counter_rng import StreamKeys
from fastgan.utils.text import first_line

_KEY = "key: "  # before the stream, in the name of a key of random numbers


@dataclass(frozen=True)
class ProgramSpec:
    """What the programs of a stage depend on, besides the machine.

    Attributes:
        config: of the run.
        resolution: in pixels.
        fade: whether the newest level fades in.
        channels, num_classes: of the images.
        micro_batch: images of a micro-batch.
    """

    config: Config
    resolution: int
    fade: bool
    channels: int
    num_classes: int
    micro_batch: int

    @property
    def names(self) -> tuple[str, ...]:
        """Those of its programs, which are functions of `MicroSteps`."""
        lazy = self.config.objective.penalty_every > 1 and self.config.objective.regularizer in SECOND_ORDER
        return ("discriminator", "penalty", "generator") if lazy else ("discriminator", "generator")

    def key(self, device: torch.device) -> str:
        """Name of the programs in the cache; all seeds share them."""
        config, system = self.config, self.config.system
        return key_of(
            {
                "networks": dataclasses.asdict(config.networks),
                "objective": dataclasses.asdict(config.objective),
                "augment": config.data.augment,
                "deterministic": system.deterministic,
                "accumulation": config.schedule.accumulation,
                "precision": system.precision,
                "memory_format": str(memory_format(config)),
                "implementations": qualification.forms_of_recordings(device),
                "stage": [self.resolution, self.fade, self.channels, self.num_classes, self.micro_batch],
                **machine_facts(device),
            }
        )

    def compiled(self, device: torch.device) -> bool:
        """Whether the cache has the programs, or the reason why there are none."""
        return file_of(self.key(device)).with_suffix(".json").is_file()

    def __str__(self) -> str:
        return f"{self.resolution} px{', fading in' if self.fade else ''}"


@dataclass(frozen=True)
class BoundProgram:
    """A program that reads and writes the tensors of given networks."""

    program: Program
    state: tuple[Holder, ...]
    present: tuple[bool, ...]
    seen: tuple[str, ...]

    def __call__(self, *inputs: Tensor) -> MicroStep:
        given = [placed(x, expected) for x, expected in zip(inputs, self.program.layouts, strict=False)]
        found = iter(self.program([*given, *(holder.fetch().detach() for holder in self.state)]))
        return unflat([next(found) if there else None for there in self.present], self.seen)


@dataclass(frozen=True)
class StagePrograms:
    """The programs of a stage, bound to its networks.

    Attributes:
        spec: what they were compiled for.
        bound: by the names of `spec`.
        tolerance: largest accepted difference to eager, relative to the norm.
        eager_ms, compiled_ms: times of one step of both networks where they were compiled.
    """

    spec: ProgramSpec
    bound: dict[str, BoundProgram]
    tolerance: float
    eager_ms: float = 0.0
    compiled_ms: float = 0.0

    def run(self, name: str, *inputs: Tensor) -> MicroStep:
        """Call the program `name`."""
        return self.bound[name](*inputs)

    def inputs(self, images: Tensor, positions: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The inputs of the programs of the discriminator."""
        return _inputs(self.spec, images, positions, labels)


def _inputs(spec: ProgramSpec, images: Tensor, positions: Tensor, labels: Tensor | None) -> list[Tensor]:
    conditional = spec.config.networks.conditional and labels is not None
    return [images, positions, *([labels] if conditional and labels is not None else [])]


def places(step: Step) -> dict[str, tuple[dict[str, Any] | None, str, Tensor]]:
    """Qualified name -> (where a tensor of a step is kept, under which key, the tensor).

    All parameters and buffers, and the keys of the random numbers, where the seed of the step is `StreamKeys`.
    """
    found: dict[str, tuple[dict[str, Any] | None, str, Tensor]] = {}
    for label, root in step.modules().items():
        for path, module in root.named_modules():
            for kept in (module._parameters, module._buffers):
                for key, tensor in kept.items():
                    if tensor is not None:
                        found[".".join(filter(None, (label, path, key)))] = (kept, key, tensor)
    if isinstance(step.seed, StreamKeys):
        found |= {_KEY + stream: (None, "", tensor) for stream, tensor in step.seed.tensors.items()}
    return found


def bind(spec: ProgramSpec, key: str, stored: dict[str, Any], step: Step) -> StagePrograms:
    """The compiled programs `key` on the networks of `step`.

    Raises:
        CompileError: they cannot be loaded, or do not fit.
    """
    keys = step.seed if isinstance(step.seed, StreamKeys) else StreamKeys(step.seed, device_of(step))
    known, inputs = places(step), example(spec, step)
    bound = {name: _bind(f"{key}-{name}", stored[name], known, keys, inputs[name]) for name in spec.names}
    return StagePrograms(spec, bound, stored["tolerance"])


def _bind(
    file: str, stored: dict[str, Any], known: dict[str, Any], keys: StreamKeys, inputs: list[Tensor]
) -> BoundProgram:
    state = []
    for path in stored["state"]:
        if path.startswith(_KEY):
            state.append(Holder(None, "", keys[path.removeprefix(_KEY)]))
        elif path in known:
            state.append(Holder(*known[path]))
        else:
            raise CompileError(f"the networks have no {path}")
    layouts = [layout(x) for x in (*inputs, *(holder.tensor for holder in state))]
    if [str(item) for item in layouts] != stored["layouts"]:
        raise CompileError("the networks' memory formats or dtypes differ from those that were compiled")
    program = Program.load(file_of(file), layouts)
    return BoundProgram(program, tuple(state), tuple(stored["present"]), tuple(stored["seen"]))


def load(spec: ProgramSpec, step: Step) -> StagePrograms | str | None:
    """The compiled programs of `spec` on the networks of `step`.

    Returns:
        None where they have not been compiled; a reason where they cannot be used.
    """
    key = spec.key(device_of(step))
    try:
        stored = json.loads(file_of(key).with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"the cache cannot be read ({first_line(error)})"
    if "reason" in stored:
        return str(stored["reason"])
    try:
        found = bind(spec, key, stored, step)
    except CompileError as error:
        return str(error)
    return dataclasses.replace(found, eager_ms=stored["eager_ms"], compiled_ms=stored["compiled_ms"])


def device_of(step: Step) -> torch.device:
    """Where the networks of a step are."""
    return next(step.generator.parameters()).device


def example(spec: ProgramSpec, step: Step) -> dict[str, list[Tensor]]:
    """Inputs of the programs of `spec`, by name, in the order of a step, with images of noise."""
    device = device_of(step)
    shape = (spec.micro_batch, spec.channels, spec.resolution, spec.resolution)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(device).contiguous(memory_format=memory_format(spec.config))
    positions = torch.arange(spec.micro_batch, device=device)
    labels = positions % spec.num_classes if spec.num_classes else None
    given = _inputs(spec, images, positions, labels)
    of_generator = [positions, images, *given[2:]] if step.loss.paired else [positions]
    return {name: of_generator if name == "generator" else given for name in spec.names}
