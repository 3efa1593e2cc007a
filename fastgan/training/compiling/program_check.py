"""Compares programs with eager steps, and times both.

A program computes the same sums in another order. Where networks have rectifiers, that is not always a small change:
one whose input rounds to the other side of zero changes a gradient by a finite amount, and large networks have some in
every step. So what rounding does to the eager step itself is measured beside it, and is the scale of what a program may
do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.compiled.program import difference_of, may_be_right
from fastgan.training.compiling.micro_step import MicroStep, MicroSteps
from fastgan.training.compiling.programs import StagePrograms, device_of, example
from fastgan.training.from_config import optimizer_factory
from fastgan.training.step import Step

_CHECKS = 5  # steps that are compared
_TIMED = 5  # rounds of steps that are timed
_ULPS = {torch.float32: 4.0}
"""Units in the last place by which a layer is off that sums some thousand products; in other types, whose sums are
float32, half a one."""
_ROUNDINGS = 3.0
"""A program may differ from eager by this many times as much as eager from itself with weights rounded otherwise."""


class ProgramDiffers(RuntimeError):
    """A program is not right, or not on this machine."""


class Comparison(NamedTuple):
    """A program and an eager function, run from the same state.

    Attributes:
        found, expected: results of the program and of the eager function.
        gradients: their difference, relative to the norm.
        others: the largest difference of losses, logged values and buffers.
        accepted: whether the program may be right: `others` is within its tolerance, and `gradients` but for kinks.
    """

    found: MicroStep
    expected: MicroStep
    gradients: float
    others: float
    accepted: bool

    @property
    def difference(self) -> float:
        """The largest."""
        return max(self.gradients, self.others)

    @property
    def used(self) -> MicroStep:
        """Results to go on with, to which the buffers belong: the program's if it is accepted."""
        return self.found if self.accepted else self.expected


def compare(
    programs: StagePrograms, name: str, inputs: Sequence[Tensor], eager: Callable[..., MicroStep], buffers: list[Tensor]
) -> Comparison:
    """Run a program and `eager` from the same state. Reads from the device.

    Args:
        programs: of the stage.
        name: of the program.
        inputs: of the program.
        eager: the function that it stands for, of the same inputs.
        buffers: those of both networks, which either may write.

    Returns:
        The comparison. Buffers are then the program's if it is accepted, so that a resumed run, which checks anew, has
        the bits of one that did not stop; else they are those of `eager`.
    """
    before = [x.clone() for x in buffers]
    expected = eager(*inputs)
    theirs = [x.clone() for x in buffers]
    restore(buffers, before)
    found = programs.run(name, *inputs)
    written = [i for i, x in enumerate(theirs) if not torch.equal(x, before[i])]
    gradients = difference_of(found.gradients, expected.gradients)
    others = max(
        # Losses and scores may be differences that cancel: their scale is that of scores, about 1.
        difference_of([found.loss, *found.seen.values()], [expected.loss, *expected.seen.values()], smallest=1.0),
        difference_of([buffers[i] for i in written], [theirs[i] for i in written]),
    )
    accepted = may_be_right(gradients, others, programs.tolerance)
    if not accepted:
        restore(buffers, theirs)
    return Comparison(found, expected, gradients, others, accepted)


@torch.no_grad()
def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Give tensors earlier values, in place."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def effect_of_rounding(
    step: Step, inputs: Sequence[Tensor], eager: Callable[..., MicroStep], expected: MicroStep
) -> float:
    """What rounding changes in the gradients of a step, relative to their norm. Reads from the device.

    Weights and images are moved by up to `_ULPS` units in the last place of the step's precision. A step that sums in
    another order moves the result of every layer by about as much.

    Args:
        step: the networks; they are left as they were.
        inputs: of `eager`; floating ones are images.
        eager: a function of `MicroSteps` of the step.
        expected: its gradients at the weights as they are.
    """
    modules = list(step.modules().values())
    moved = [p.data for module in modules for p in module.parameters()]
    kept = [*moved, *(x for module in modules for x in module.buffers())]
    before = [x.clone() for x in kept]
    dtype = step.autocast_dtype or torch.float32
    off = _ULPS.get(dtype, 0.5) * torch.finfo(dtype).eps
    random = torch.Generator().manual_seed(0)

    def move(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=random, dtype=torch.float32).to(x.device).mul_(2.0 * off).add_(1.0 - off)
        return noise.to(x.dtype).mul_(x)

    for x in moved:
        x.copy_(move(x))
    found = eager(*(move(x) if x.is_floating_point() else x for x in inputs))
    restore(kept, before)
    return difference_of(found.gradients, expected.gradients)


def _require_right(name: str, differences: list[float], roundings: list[float], tolerance: float) -> None:
    """Raise unless gradients agree in the best step, or differ as much as rounding makes them."""
    if min(differences) <= tolerance:
        return
    most, allowed = statistics.median(differences), _ROUNDINGS * statistics.median(roundings)
    if not most <= allowed:
        raise ProgramDiffers(
            f"the compiled {name} differs from eager by {most:.1e} of the norm, and rounding explains {allowed:.1e}"
        )


def measure(programs: StagePrograms, eager: MicroSteps) -> dict[str, Any]:
    """Compare steps of both forms along a short eager training, then time them in turn.

    Returns:
        "difference" and "rounding", the largest of the programs' medians, and "eager_ms" and "compiled_ms".

    Raises:
        ProgramDiffers: a program is not right.
    """
    step, config = eager.step, programs.spec.config
    networks = {"discriminator": step.discriminator, "penalty": step.discriminator, "generator": step.generator}
    buffers = [x for module in step.modules().values() for x in module.buffers()]
    parameters = {name: [p for p in networks[name].parameters() if p.requires_grad] for name in programs.spec.names}
    optimizers = {
        name: optimizer_factory(config, discriminator=name != "generator")(of) for name, of in parameters.items()
    }
    differences: dict[str, list[float]] = {name: [] for name in programs.spec.names}
    roundings: dict[str, list[float]] = {name: [] for name in programs.spec.names}
    for _ in range(_CHECKS):
        for name, inputs in example(programs.spec, step).items():
            function = getattr(eager, name)
            compared = compare(programs, name, inputs, function, buffers)
            if not compared.accepted:
                raise ProgramDiffers(f"the compiled {name} differs from eager by {compared.difference:.1e} of the norm")
            differences[name].append(compared.gradients)
            if min(differences[name]) > programs.tolerance:
                roundings[name].append(effect_of_rounding(step, inputs, function, compared.expected))
            for p, gradient in zip(parameters[name], compared.found.gradients, strict=True):
                p.grad = gradient
            optimizers[name].step()
    for name in programs.spec.names:
        _require_right(name, differences[name], roundings[name], programs.tolerance)
    return {
        "difference": max(statistics.median(values) for values in differences.values()),
        "rounding": max((statistics.median(values) for values in roundings.values() if values), default=0.0),
        **_times(programs, eager),
    }


def _times(programs: StagePrograms, eager: MicroSteps) -> dict[str, float]:
    """Median milliseconds of a step in both forms; a penalty of its own counts as often as it is due."""
    device, every = device_of(eager.step), programs.spec.config.objective.penalty_every
    times: dict[str, list[float]] = {"eager_ms": [], "compiled_ms": []}
    for _ in range(_TIMED):
        for form in times:
            total = 0.0
            for name, inputs in example(programs.spec, eager.step).items():
                began = time.perf_counter()
                getattr(eager, name)(*inputs) if form == "eager_ms" else programs.run(name, *inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                total += (time.perf_counter() - began) / (every if name == "penalty" else 1)
            times[form].append(1e3 * total)
    return {form: statistics.median(values) for form, values in times.items()}
