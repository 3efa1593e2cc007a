"""Compiles the programs of a stage into the user's cache."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastgan.compiled.program import compile_graph, file_of, layout, tolerance_of
from fastgan.compiled.recording import NotRecordable, record
from fastgan.models.pggan import Progressive
from fastgan.training.compiling.micro_step import MicroSteps, flat
from fastgan.training.compiling.program_check import ProgramDiffers, measure
from fastgan.training.compiling.programs import ProgramSpec, bind, example, places
from fastgan.training.from_config import build_augmentation, build_step, memory_format, network_values
from fastgan.training.networks import build_networks
from fastgan.training.step import Step
from fastgan.utils.counter_rng import StreamKeys
from fastgan.utils.files import write_atomic
from fastgan.utils.text import first_line

_RETRY = "retry"  # key of a failure that the next run forgets


def new_step(spec: ProgramSpec, device: torch.device) -> Step:
    """A step on new networks, whose keys of random numbers are tensors."""
    values = network_values(
        spec.config.networks, resolution=spec.resolution, channels=spec.channels, num_classes=spec.num_classes
    )
    networks = build_networks(spec.config, values)
    for network in networks:
        network.to(device).to(memory_format=memory_format(spec.config))
        if isinstance(network, Progressive):
            network.set_alpha(0.5 if spec.fade else 1.0)
    augmentation = build_augmentation(spec.config, spec.channels, device)
    step = build_step(spec.config, *networks, spec.num_classes, augmentation)
    step.seed = StreamKeys(spec.config.run.seed, device)
    if augmentation is not None:
        augmentation.seed = step.seed
    return step


def forget_failure(spec: ProgramSpec, device: torch.device) -> None:
    """Forget why `spec` could not be compiled if the reason is the machine's: no compiler, a full disk."""
    file = file_of(spec.key(device)).with_suffix(".json")
    with contextlib.suppress(OSError, ValueError):
        if _RETRY in json.loads(file.read_bytes()):
            file.unlink()


def build(spec: ProgramSpec, device: torch.device) -> dict[str, Any]:
    """Compile the programs of `spec` into the cache, and check them there; what cannot be used is stored as a reason.

    Returns:
        What was stored: "reason", or what `programs.load` reads.

    Raises:
        OSError: the cache cannot be written.
    """
    key = spec.key(device)
    try:
        stored = _build(spec, key, device)
    except (NotRecordable, ProgramDiffers) as error:
        stored = {"reason": str(error)}
    except Exception as error:  # a fault of one program must not end the others, and may be gone in the next run
        stored = {"reason": f"{type(error).__name__}: {first_line(error)}", _RETRY: True}
    file = file_of(key).with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(file, json.dumps(stored, indent=1).encode())
    return stored


class Recorded(NamedTuple):
    """A function of `MicroSteps`, recorded.

    Attributes:
        graph: of its operations.
        arguments: those of the graph: the inputs, then the state.
        stored: what `programs.bind` reads: how arguments are found and results are named.
    """

    graph: fx.GraphModule
    arguments: list[Tensor]
    stored: dict[str, Any]


def recordings(spec: ProgramSpec, step: Step) -> Iterator[tuple[str, Recorded]]:
    """The functions of `spec`, by name, recorded on a `new_step`."""
    eager = MicroSteps(step, spec.config.schedule.accumulation, memory_format(spec.config))
    for name, inputs in example(spec, step).items():
        seen: list[str] = []
        getattr(eager, name)(*inputs)  # makes the keys of its streams, which are part of the state
        names = {id(tensor): path for path, (_, _, tensor) in places(step).items()}

        def lifted(tensor: Tensor, names: dict[int, str] = names) -> bool:
            return id(tensor) in names

        recording, _ = record(flat(getattr(eager, name), seen), inputs, lifted)
        arguments = [*inputs, *recording.state_tensors()]
        stored = {
            "state": [names[id(holder.tensor)] for holder in recording.state],
            "layouts": [str(layout(x)) for x in arguments],
            "present": list(recording.present),
            "seen": seen,
        }
        yield name, Recorded(recording.graph, arguments, stored)


def _build(spec: ProgramSpec, key: str, device: torch.device) -> dict[str, Any]:
    began = time.monotonic()
    step = new_step(spec, device)
    stored: dict[str, Any] = {"tolerance": 0.0}
    for name, recorded in recordings(spec, step):
        compile_graph(recorded.graph, recorded.arguments, file_of(f"{key}-{name}"))
        stored["tolerance"] = max(stored["tolerance"], tolerance_of(recorded.graph, recorded.arguments))
        stored[name] = recorded.stored
    seconds = time.monotonic() - began
    eager = MicroSteps(step, spec.config.schedule.accumulation, memory_format(spec.config))
    return {**stored, **measure(bind(spec, key, stored, step), eager), "compile_seconds": seconds}
