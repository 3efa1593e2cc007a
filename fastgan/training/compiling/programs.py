"""The programs of a stage: what they depend on, how they are compiled and checked, and how they are bound to networks.

They are recorded on networks of their own, built from the configuration alone, so that another process can compile
them ahead. Files in the user's cache are named by everything that they depend on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.compiled.program import (
    CompileError,
    Program,
    compile_graph,
    difference_of,
    file_of,
    key_of,
    layout,
    machine_facts,
    may_be_right,
    tolerance_of,
)
from fastgan.compiled.recording import Holder, NotRecordable, record
from fastgan.config import Config
from fastgan.models.pggan import Progressive
from fastgan.ops import qualification
from fastgan.training.compiling.micro_step import MicroStep, MicroSteps, flat, unflat
from fastgan.training.from_config import (
    build_augmentation,
    build_step,
    memory_format,
    network_values,
    optimizer_factory,
)
from fastgan.training.networks import build_networks
from fastgan.training.step import Step
from fastgan.utils.files import write_atomic
from fastgan.utils.text import first_line

_NAMES = ("discriminator", "generator")
_RETRY = "retry"  # key of a failure that the next run forgets
_CHECKS = 5  # steps that are compared
_TIMED = 5  # pairs of steps that are timed


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

    def key(self, device: torch.device) -> str:
        """Name of the programs in the cache."""
        config, system = self.config, self.config.system
        return key_of(
            {
                "networks": dataclasses.asdict(config.networks),
                "objective": dataclasses.asdict(config.objective),
                "seed": config.run.seed,
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
        found = iter(self.program([*inputs, *(holder.fetch().detach() for holder in self.state)]))
        return unflat([next(found) if there else None for there in self.present], self.seen)


@dataclass(frozen=True)
class StagePrograms:
    """Both programs of a stage, bound to its networks.

    Attributes:
        spec: what they were compiled for.
        tolerance: largest accepted difference to eager, relative to the norm.
        eager_ms, compiled_ms: times of one step of both networks where they were compiled.
    """

    spec: ProgramSpec
    discriminator: BoundProgram
    generator: BoundProgram
    tolerance: float
    eager_ms: float
    compiled_ms: float

    def inputs(self, images: Tensor, positions: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The inputs of the discriminator's program."""
        return _inputs(self.spec, images.contiguous(memory_format=memory_format(self.spec.config)), positions, labels)


def _inputs(spec: ProgramSpec, images: Tensor, positions: Tensor, labels: Tensor | None) -> list[Tensor]:
    conditional = spec.config.networks.conditional and labels is not None
    return [images, positions, *([labels] if conditional and labels is not None else [])]


def entries(modules: dict[str, nn.Module]) -> dict[str, tuple[dict[str, Any], str, Tensor]]:
    """Qualified name -> (where the tensor is kept, under which key, the tensor): all parameters and buffers."""
    found = {}
    for label, root in modules.items():
        for path, module in root.named_modules():
            for kept in (module._parameters, module._buffers):
                for key, tensor in kept.items():
                    if tensor is not None:
                        found[".".join(filter(None, (label, path, key)))] = (kept, key, tensor)
    return found


def _bind(spec: ProgramSpec, key: str, name: str, stored: dict[str, Any], step: Step) -> BoundProgram:
    places = entries(step.modules())
    missing = [path for path in stored["state"] if path not in places]
    if missing:
        raise CompileError(f"the networks have no {missing[0]}")
    state = tuple(Holder(*places[path]) for path in stored["state"])
    layouts = [layout(x) for x in (*_example(spec, step)[name], *(holder.tensor for holder in state))]
    if [str(item) for item in layouts] != stored["layouts"]:
        raise CompileError("the networks' memory formats or dtypes differ from those that were compiled")
    return BoundProgram(
        Program.load(file_of(f"{key}-{name}"), layouts), state, tuple(stored["present"]), tuple(stored["seen"])
    )


def load(spec: ProgramSpec, step: Step) -> StagePrograms | str | None:
    """The compiled programs of `spec` on the networks of `step`.

    Returns:
        None where they have not been compiled; a reason where they cannot be used.
    """
    key = spec.key(_device(step))
    try:
        stored = json.loads(file_of(key).with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"the cache cannot be read ({first_line(error)})"
    if "reason" in stored:
        return str(stored["reason"])
    try:
        d, g = (_bind(spec, key, name, stored[name], step) for name in _NAMES)
    except CompileError as error:
        return str(error)
    return StagePrograms(spec, d, g, stored["tolerance"], stored["eager_ms"], stored["compiled_ms"])


def _device(step: Step) -> torch.device:
    return next(step.generator.parameters()).device


def _example(spec: ProgramSpec, step: Step) -> dict[str, list[Tensor]]:
    """Inputs of both programs, with images of noise."""
    device = _device(step)
    shape = (spec.micro_batch, spec.channels, spec.resolution, spec.resolution)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(device).contiguous(memory_format=memory_format(spec.config))
    positions = torch.arange(spec.micro_batch, device=device)
    labels = positions % spec.num_classes if spec.num_classes else None
    given = _inputs(spec, images, positions, labels)
    return {"discriminator": given, "generator": [positions, images, *given[2:]] if step.loss.paired else [positions]}


def compare(
    programs: StagePrograms, name: str, inputs: Sequence[Tensor], eager: Callable[..., MicroStep], buffers: list[Tensor]
) -> tuple[MicroStep, float, bool]:
    """Run a program and `eager` from the same state. Reads from the device.

    Args:
        programs: of the stage.
        name: "discriminator" or "generator".
        inputs: of the program.
        eager: the function that it stands for, of the same inputs.
        buffers: those of both networks, which either may write.

    Returns:
        The results; the difference, the largest of those of gradients, values and buffers; and whether the program may
        be right: values and buffers agree within its tolerance, and gradients but for kinks. Results and buffers are
        then the program's, so that a resumed run, which checks anew, has the bits of one that did not stop; else they
        are those of `eager`.
    """
    before = [x.clone() for x in buffers]
    expected = eager(*inputs)
    theirs = [x.clone() for x in buffers]
    _restore(buffers, before)
    found: MicroStep = getattr(programs, name)(*inputs)
    written = [i for i, x in enumerate(theirs) if not torch.equal(x, before[i])]
    gradients = difference_of(found.gradients, expected.gradients)
    others = max(
        # Losses and scores may be differences that cancel: their scale is that of scores, about 1.
        difference_of([found.loss, *found.seen.values()], [expected.loss, *expected.seen.values()], smallest=1.0),
        difference_of([buffers[i] for i in written], [theirs[i] for i in written]),
    )
    difference = max(gradients, others)
    if may_be_right(gradients, others, programs.tolerance):
        return found, difference, True
    _restore(buffers, theirs)
    return expected, difference, False


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _step(spec: ProgramSpec, device: torch.device) -> Step:
    """A step on new networks."""
    values = network_values(
        spec.config.networks, resolution=spec.resolution, channels=spec.channels, num_classes=spec.num_classes
    )
    networks = build_networks(spec.config, values)
    for network in networks:
        network.to(device).to(memory_format=memory_format(spec.config))
        if isinstance(network, Progressive):
            network.set_alpha(0.5 if spec.fade else 1.0)
    augmentation = build_augmentation(spec.config, spec.channels, device)
    return build_step(spec.config, *networks, spec.num_classes, augmentation)


class _Differs(RuntimeError):
    """A program is not right, or not on this machine."""


def forget_failure(spec: ProgramSpec, device: torch.device) -> None:
    """Forget why `spec` could not be compiled if the reason is the machine's: no compiler, a full disk."""
    file = file_of(spec.key(device)).with_suffix(".json")
    with contextlib.suppress(OSError, ValueError):
        if _RETRY in json.loads(file.read_bytes()):
            file.unlink()


def build(spec: ProgramSpec, device: torch.device) -> dict[str, Any]:
    """Compile the programs of `spec` into the cache, and check them there; what cannot be used is stored as a reason.

    Returns:
        What was stored: "reason", or what `load` reads.

    Raises:
        OSError: the cache cannot be written.
    """
    key = spec.key(device)
    try:
        stored = _build(spec, key, device)
    except (NotRecordable, _Differs) as error:
        stored = {"reason": str(error)}
    except Exception as error:  # a fault of one program must not end the others, and may be gone in the next run
        stored = {"reason": f"{type(error).__name__}: {first_line(error)}", _RETRY: True}
    file = file_of(key).with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(file, json.dumps(stored, indent=1).encode())
    return stored


def _build(spec: ProgramSpec, key: str, device: torch.device) -> dict[str, Any]:
    began = time.monotonic()
    step = _step(spec, device)
    eager = MicroSteps(step, spec.config.schedule.accumulation, memory_format(spec.config))
    names = {id(tensor): path for path, (_, _, tensor) in entries(step.modules()).items()}
    stored: dict[str, Any] = {"tolerance": 0.0}
    for name, inputs in _example(spec, step).items():
        seen: list[str] = []
        recording, _ = record(flat(getattr(eager, name), seen), inputs, lambda tensor: id(tensor) in names)
        arguments = [*inputs, *recording.state_tensors()]
        compile_graph(recording.graph, arguments, file_of(f"{key}-{name}"))
        stored["tolerance"] = max(stored["tolerance"], tolerance_of(recording.graph, arguments))
        stored[name] = {
            "state": [names[id(holder.tensor)] for holder in recording.state],
            "layouts": [str(layout(x)) for x in arguments],
            "present": list(recording.present),
            "seen": seen,
        }
    seconds = time.monotonic() - began
    d, g = (_bind(spec, key, name, stored[name], step) for name in _NAMES)
    programs = StagePrograms(spec, d, g, stored["tolerance"], 0.0, 0.0)
    return {**stored, **_measure(programs, eager, device), "compile_seconds": seconds}


def _measure(programs: StagePrograms, eager: MicroSteps, device: torch.device) -> dict[str, Any]:
    """Compare steps of both forms along a short eager training, then time them in turn."""
    step = eager.step
    networks = {"discriminator": step.discriminator, "generator": step.generator}
    buffers = [x for module in step.modules().values() for x in module.buffers()]
    differences: dict[str, list[float]] = {name: [] for name in _NAMES}
    wrong = False
    optimizers = {
        name: optimizer_factory(programs.spec.config, discriminator=name == "discriminator")(
            [p for p in network.parameters() if p.requires_grad]
        )
        for name, network in networks.items()
    }
    for _ in range(_CHECKS):
        for name, inputs in _example(programs.spec, step).items():
            found, difference, accepted = compare(programs, name, inputs, getattr(eager, name), buffers)
            differences[name].append(difference)
            wrong = wrong or not accepted
            for p, gradient in zip(optimizers[name].param_groups[0]["params"], found.gradients, strict=True):
                p.grad = gradient
            optimizers[name].step()
    least, most = (max(of(values) for values in differences.values()) for of in (min, max))
    if wrong or least > programs.tolerance:
        raise _Differs(f"it differs from eager by {most:.1e} of the norm")
    times: dict[str, list[float]] = {"eager_ms": [], "compiled_ms": []}
    for _ in range(_TIMED):
        for form, runner in (("eager_ms", eager), ("compiled_ms", programs)):
            began = time.perf_counter()
            for name, inputs in _example(programs.spec, step).items():
                getattr(runner, name)(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[form].append(1e3 * (time.perf_counter() - began))
    return {"difference": least, **{form: statistics.median(values) for form, values in times.items()}}
