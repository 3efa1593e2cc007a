"""`fastgan.compile_step`: loss and gradients of any function of a critic as one compiled program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgan.compiled.program import (
    CompileError,
    Layout,
    Program,
    compile_graph,
    difference_of,
    file_of,
    graph_facts,
    key_of,
    layout,
    machine_facts,
    may_be_right,
    tolerance_of,
)
from fastgan.compiled.recording import NotRecordable, Outputs, Recording, record, with_strides_of


@dataclass(frozen=True)
class _Compiled:
    recording: Recording
    program: Program | None
    aux_names: list[str] | None

    def applies(self) -> bool:
        """Whether the modules are still in the mode in which they were recorded."""
        return all(module.training == training for module, training in self.recording.modules)

    def __call__(self, inputs: Sequence[Tensor]) -> Outputs:
        if self.program is None:
            return self.recording.replay(*inputs)
        tensors = [*(x.detach() for x in inputs), *self.recording.state_tensors()]
        wrong = self.program.mismatch(tensors)
        if wrong is not None:
            raise _Changed
        return self.recording.restore(self.program(tensors))


class _Changed(Exception):
    """A parameter or buffer has another shape, dtype, memory format or device than when it was recorded."""


class CompiledStep:
    """See `compile_step`.

    Attributes:
        notes: a line for each program that could not be used, and why.
    """

    def __init__(
        self, loss_fn: Callable[..., Any], parameters: Iterable[Tensor], *, has_aux: bool = False, compile: bool = True
    ) -> None:
        self._loss_fn, self._has_aux, self._compile = loss_fn, has_aux, compile
        self._parameters = list(parameters)
        for p in self._parameters:
            if not isinstance(p, Tensor) or not p.is_leaf:
                raise TypeError(f"parameters must be leaf tensors, got {type(p).__name__}")
            if p._backward_hooks:
                raise NotRecordable("a parameter has a gradient hook, which would run once: apply it to the gradients")
        self._compiled: dict[Any, list[_Compiled]] = {}
        self._aux_names: list[str] | None = None
        self.notes: list[str] = []

    def __call__(self, *inputs: Any) -> tuple[Any, list[Tensor | None]]:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        signature = self._signature(inputs)
        for compiled in self._compiled.get(signature, []):
            if compiled.applies():
                try:
                    return self._result(compiled(tensors), compiled.aux_names)
                except _Changed:
                    self._compiled[signature].remove(compiled)
                    break
        return self._result(self._record(signature, inputs, tensors), self._aux_names)

    def _signature(self, inputs: Sequence[Any]) -> Any:
        """What a program is made for: the layouts of tensors, other arguments by value, autocast, what is trained."""
        given: list[Layout | Any] = [layout(x) if isinstance(x, Tensor) else (type(x), x) for x in inputs]
        devices = {x.device.type for x in [*inputs, *self._parameters] if isinstance(x, Tensor)}
        cast = [
            (d, torch.get_autocast_dtype(d)) for d in sorted(devices) if d != "meta" and torch.is_autocast_enabled(d)
        ]
        return (*given, tuple(cast), tuple(p.requires_grad for p in self._parameters))

    def _function(self, inputs: Sequence[Any]) -> Callable[..., Outputs]:
        trained = [p for p in self._parameters if p.requires_grad]

        def function(*tensors: Tensor) -> Outputs:
            values = iter(tensors)
            found = self._loss_fn(*[next(values) if isinstance(x, Tensor) else x for x in inputs])
            loss, aux = found if self._has_aux else (found, [])
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"loss_fn must return a loss of one element, got {loss!r:.60}")
            self._aux_names = [str(name) for name in aux] if isinstance(aux, dict) else None
            extra = list(aux.values()) if isinstance(aux, dict) else list(aux)
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            gradients = [None if g is None else with_strides_of(g, p) for g, p in zip(found, trained, strict=True)]
            return [loss.detach(), *(x.detach() for x in extra), *gradients]

        return function

    def _record(self, signature: Any, inputs: Sequence[Any], tensors: list[Tensor]) -> Outputs:
        recording, outputs = record(self._function(inputs), tensors)
        self._require_repeatable(recording, tensors, outputs)
        program = None
        if self._compile:
            try:
                program = self._checked(recording, tensors)
            except CompileError as error:
                note = f"not compiled, its operations run one by one: {error}"
                self.notes.append(note)
                warnings.warn(f"fastgan.compile_step: {note}", stacklevel=3)
        self._compiled.setdefault(signature, []).append(_Compiled(recording, program, self._aux_names))
        return outputs

    @staticmethod
    def _require_repeatable(recording: Recording, inputs: list[Tensor], outputs: Outputs) -> None:
        """Refuse a recording that gives other values than the call that was recorded.

        Not for a function that writes buffers: they have moved since.
        """
        state = recording.state_tensors()
        copies = [x.clone() for x in state]
        with torch.no_grad():
            again = recording.restore(recording.graph(*(x.detach() for x in inputs), *copies))
        if all(map(torch.equal, state, copies)) and difference_of(again, outputs) > tolerance_of(
            recording.graph, [*inputs, *state]
        ):
            raise NotRecordable("a repetition has other values: something computes outside of PyTorch's operations")

    def _checked(self, recording: Recording, inputs: list[Tensor]) -> Program:
        """The program of a recording, from the cache or compiled now, once it agrees with the recorded operations."""
        trained = sum(p.requires_grad for p in self._parameters)
        inputs = [x.detach() for x in inputs]
        state = recording.state_tensors()
        arguments = [*inputs, *state]
        file = file_of(key_of({**graph_facts(recording.graph, arguments), **machine_facts(arguments[0].device)}))
        if not file.exists():
            compile_graph(recording.graph, arguments, file)
        program = Program.load(file, [layout(x) for x in arguments])
        ours, theirs = ([x.clone() for x in state] for _ in range(2))
        with torch.no_grad():
            expected = recording.graph(*inputs, *theirs)
        found = program([*inputs, *ours])
        first = 1 + sum(recording.present[1:-trained])  # of the gradients
        written = [i for i, x in enumerate(state) if not torch.equal(x, theirs[i])]
        gradients = difference_of(found[first:], expected[first:])
        others = max(
            difference_of(found[:first], expected[:first], smallest=1.0),
            difference_of([ours[i] for i in written], [theirs[i] for i in written]),
        )
        if not may_be_right(gradients, others, tolerance_of(recording.graph, arguments)):
            difference = max(gradients, others)
            raise CompileError(f"the program differs from the recorded operations by {difference:.1e} of their norm")
        return program

    def _result(self, outputs: Outputs, aux_names: list[str] | None) -> tuple[Any, list[Tensor | None]]:
        trained = sum(p.requires_grad for p in self._parameters)
        loss, aux, gradients = outputs[0], outputs[1 : len(outputs) - trained], iter(outputs[len(outputs) - trained :])
        every = [next(gradients) if p.requires_grad else None for p in self._parameters]
        if not self._has_aux:
            return loss, every
        return (loss, aux if aux_names is None else dict(zip(aux_names, aux, strict=True))), every


def compile_step(
    loss_fn: Callable[..., Any], parameters: Iterable[Tensor], *, has_aux: bool = False, compile: bool = True
) -> CompiledStep:
    """Compile loss and gradients of `loss_fn`, gradient penalties inside it included.

    `torch.compile` refuses a function that differentiates twice. Here the whole call, with every backward pass in it,
    is recorded as one graph of ATen operations, compiled by TorchInductor, compared with the recorded operations, and
    from then on runs as one call:

        step = fastgan.compile_step(critic_loss, critic.parameters())
        loss, gradients = step(real, fake, weight)
        for p, gradient in zip(critic.parameters(), gradients):
            p.grad = gradient
        optimizer.step()

    The first call of each kind runs `loss_fn` itself, and compiles (seconds to minutes; later processes find the
    program in the cache). Another shape, dtype, memory format, autocast, `training` of a module or `requires_grad` of a
    parameter is recorded anew. Weights and buffers are read where they are, so an optimizer may update them, and
    buffers that the modules write (batch norm, spectral norm) are written as in an eager call.

    What is not a tensor is a constant of the program: a Python number that `loss_fn` reads from elsewhere keeps the
    value that it had. Random numbers must be inputs.

    Args:
        loss_fn: from tensors (and hashable values) to a scalar loss, or with `has_aux` to (loss, aux): a list or a dict
            of tensors to return beside it.
        parameters: leaf tensors; the gradients of those that require one are computed.
        has_aux: see `loss_fn`.
        compile: False: run the recorded operations one by one, with the values of an eager call to the bit.

    Returns:
        A function of the arguments of `loss_fn`. It returns the loss, or (loss, aux), and a list with the gradient of
        each parameter: None where it does not require one or the loss does not depend on it. Under several processes
        average these gradients; do not put a DistributedDataParallel module into `loss_fn`.

    Raises:
        NotRecordable: in a call: a module has hooks, or the function draws random numbers or reads values back.
    """
    return CompiledStep(loss_fn, parameters, has_aux=has_aux, compile=compile)
