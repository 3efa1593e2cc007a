"""Which implementation of an op runs: this file decides, for every op of the package.

Every op has a plain PyTorch implementation, `torch`, which is its reference and its fallback, and some of:

- `triton` and `cuda`: kernels for GPUs; `cpp`: kernels for CPUs (entries made in `kernel_registry.py`);
- `chunked`: plain PyTorch in blocks, with little memory;
- `fused`: one convolution of PyTorch's in place of a convolution and a change of scale;
- `native`: PyTorch's ops in an order that sends no zeros back, without an autograd Function, for small tensors;
- `lean`: PyTorch's kernels under an autograd Function that skips second derivatives which are zero.

The shipped table is the order `PREFERENCE` below and the crossovers in `Implementation.not_preferred_reason`: the first
implementation that supports a call (`unsupported_reason`) and is preferred for it runs. Calls of a class that was
measured on this machine (`Op.classify`: device, dtype, layout, size) run the fastest that was right there instead, see
`fastgan.ops.qualification`. `Op.choose` is the one place that decides. An op's file lists its implementations.
`backend=` of a call or `use_backend` around it requests one by name, and then one that cannot run raises instead
of giving way to another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.ops.dispatch.torch_private import (
    current_backward,
    in_forward_mode,
    saved_tensors_are_hooked,
)

# A compiler fuses plain PyTorch itself and takes no second derivative; an exported or traced program runs where the
# kernels are not installed; a transform cannot enter autograd Functions without a rule for it. All get plain PyTorch.
from fastgan.utils.torch_modes import in_transform as in_transform

# In place of an implementation in `_requested`: see `recorded_forms` and `by_shipped_table`.
_RECORDED, _SHIPPED = "recorded", "shipped"

PREFERENCE = ("triton", "cuda", "winograd", "cpp", "chunked", "fused", "native", "lean", "torch")

# Called with the tensors of a call and, as keywords, options of it; or without any, about the machine alone.
# Returns a reason, or None where there is none.
ReasonFn = Callable[..., str | None]

# Op -> requested implementation; "*" is every op that has it.
_requested: ContextVar[Mapping[str, str]] = ContextVar("fastgan_backend", default=MappingProxyType({}))

# The requests of the blocks that are open in any thread, the last one's last.
_open: list[Mapping[str, str]] = []


def _requests() -> Mapping[str, str]:
    """What is requested here: in a backward pass on a thread of autograd's own, by the block that was entered last.

    A GPU's backward pass runs on such a thread, where a checkpoint calls the ops of the forward pass again.
    """
    requested = _requested.get()
    if requested or not _open or current_backward is None or current_backward() == -1:
        return requested
    return _open[-1]


def is_recorded() -> bool:
    """Whether the call is inside `recorded_forms`."""
    return _requests().get("*") == _RECORDED


def _no_reason(*inputs: Tensor | None, **options: object) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        unsupported_reason: why it cannot run these inputs on this machine; None when it can.
        not_preferred_reason: the shipped table: why it is not the default for inputs that it can run (a crossover
            measured on another machine); None when it is.
        note: what it is, for `backends`.
        device: the only device type that it runs on; None for any.
    """

    unsupported_reason: ReasonFn = _no_reason
    not_preferred_reason: ReasonFn = _no_reason
    note: str = ""
    device: str | None = None


REFERENCE = Implementation(note="the reference, in plain PyTorch")

LEAN = Implementation(note="PyTorch's kernels; second derivatives that are zero are skipped")

NATIVE = Implementation(note="PyTorch's own ops, without an autograd Function; no zeros are sent back")

OPS: dict[str, Op] = {}


_SIZES = [min(max((bits + 1) // 2, 5), 11) for bits in range(65)]


def size_class(elements: int) -> int:
    """k of a number of elements in (4^(k-1), 4^k]; 5 for all below, and 11 (4 million) for all above."""
    return _SIZES[(elements - 1).bit_length()]


class CallClass(NamedTuple):
    """Calls for which one implementation is the default, once it was measured.

    A plain tuple of the same values stands for it in `Op.choose`, where making one takes a third of the time.

    Attributes:
        device: where the call runs.
        dtype: in which it computes.
        contiguous: whether its first input is; else it is in channels_last, or a view.
        size: `size_class` of its first input.
        variant: other integers that matter to this op, as `Op.variant` names them.
    """

    device: torch.device
    dtype: torch.dtype
    contiguous: bool
    size: int
    variant: tuple[int, ...] = ()


def by_size(x: Tensor, *_: Tensor | None, **options: object) -> tuple[object, ...]:
    """The class of a call that depends on its first input alone."""
    return x.device, x.dtype, x.is_contiguous(), size_class(x.numel()), ()


class Decision(NamedTuple):
    """What was measured for a class of calls.

    Attributes:
        candidates: implementations that were right, the default first.
        reasons: implementation -> what was measured, for `backends`.
    """

    candidates: tuple[tuple[str, Implementation], ...]
    reasons: Mapping[str, str]


_UNKNOWN = Decision((("", Implementation()),), {})

# Called for a class that `Op.choose` meets first; the answer is kept. None: the shipped table decides.
Decide = Callable[["Op", CallClass, tuple[Tensor | None, ...], Mapping[str, object]], Decision | None]
_decide: Decide | None = None
_deterministic = torch.are_deterministic_algorithms_enabled


def decide_with(decide: Decide | None) -> None:
    """Let `decide` measure the classes of calls that are met from now on, or forget what was measured."""
    global _decide
    _decide = decide
    for op in OPS.values():
        op.decisions.clear()
        op.native_calls.clear()
        op.wrong.clear()


class Op:
    """The implementations of one op; `torch`, which runs any call, is always among them.

    Args:
        name: of the public function.
        implementations: those besides `torch`, by name.
        supports_forward_mode: whether they can all be differentiated in forward mode (`torch.autograd.forward_ad`).
        classify: the class of a call, called as `Implementation.unsupported_reason` is; runs in every call. It returns
            None for calls that the shipped table decides; without it, that decides all.
        variant: names of the integers in `CallClass.variant`.

    Attributes:
        decisions: what was measured, by class; None where the shipped table decides.
        native_calls: the `known` of calls that `allows_fast_path` found to be `native`, by the decisions of now.
        wrong: (device type, dtype, implementation) that gave wrong results on this machine.
    """

    def __init__(
        self,
        name: str,
        implementations: dict[str, Implementation] | None = None,
        supports_forward_mode: bool = False,
        classify: Callable[..., tuple[object, ...] | None] | None = None,
        variant: tuple[str, ...] = (),
    ) -> None:
        every = {**(implementations or {}), "torch": REFERENCE}
        assert set(every) <= set(PREFERENCE)
        self.name = name
        self.supports_forward_mode = supports_forward_mode
        self.classify, self.variant = classify, variant
        self.decisions: dict[tuple[object, ...], Decision | None] = {}
        self.native_calls: set[object] = set()
        self.wrong: set[tuple[str, torch.dtype, str]] = set()
        self.implementations = {name: every[name] for name in PREFERENCE if name in every}
        self._by_device: dict[str | None, list[tuple[str, Implementation]]] = {}
        OPS[name] = self

    def choose(self, backend: str | None, *inputs: Tensor | None, **options: object) -> str:
        """Name of the implementation that runs a call.

        Args:
            backend: the caller's request, or None.
            inputs: the tensors of the call.
            options: other arguments of the call that the reasons of this op depend on.

        Raises:
            ValueError: the request, or that of `use_backend`, names no implementation of this op or one that cannot
                run.
        """
        forward_mode = in_forward_mode()
        if backend is None and (in_transform() or (forward_mode and not self.supports_forward_mode)):
            return "torch"
        requested = self.requested(backend)
        if requested is None:
            if _open and is_recorded():
                return self.recorded(*inputs, **options)
            fixed = _decide is None or forward_mode or (_open and _requests().get("*") == _SHIPPED)
            decision = None if fixed else self.decision(inputs, options)
            if decision is None:
                return self.shipped(*inputs, **options)
            for name, it in decision.candidates:
                if it.unsupported_reason(*inputs, **options) is None:
                    return name
            return "torch"
        if requested not in self.implementations:
            raise ValueError(f"backend must be {', '.join(self.implementations)} for {self.name}, got {requested!r}")
        reason = self.implementations[requested].unsupported_reason(*inputs, **options)
        if reason is not None:
            reasons = {name: it.unsupported_reason(*inputs, **options) for name, it in self.implementations.items()}
            others = ", ".join(name for name, why in reasons.items() if why is None)
            raise ValueError(f"backend {requested!r}: {reason}; can run this call: {others}")
        return requested

    def decision(self, inputs: tuple[Tensor | None, ...], options: Mapping[str, object]) -> Decision | None:
        """What was measured for this call, which may be measured now; None where the shipped table decides."""
        if self.classify is None or not inputs or _decide is None or not is_measurable(inputs[0]) or _deterministic():
            return None
        key = self.classify(*inputs, **options)
        if key is None:
            return None
        try:
            return self.decisions[key]
        except KeyError:
            return _decide(self, CallClass(*key), inputs, options)  # type: ignore[arg-type]

    def class_of(self, *inputs: Tensor | None, **options: object) -> CallClass | None:
        """The class of a call; None where it has none, and the shipped table decides."""
        key = None if self.classify is None else self.classify(*inputs, **options)
        return None if key is None else CallClass(*key)  # type: ignore[arg-type]

    def shipped(self, *inputs: Tensor | None, **options: object) -> str:
        """Name of the implementation that runs a call by the shipped table; none that was wrong on this machine."""
        device = inputs[0].device.type if inputs and inputs[0] is not None else None
        for name, it in self._by_device.get(device) or self._candidates(device):
            if (
                it.unsupported_reason(*inputs, **options) is None
                and it.not_preferred_reason(*inputs, **options) is None
                and not (self.wrong and self._was_wrong(name, inputs))
            ):
                return name
        return "torch"

    def _was_wrong(self, name: str, inputs: tuple[Tensor | None, ...]) -> bool:
        first = inputs[0] if inputs else None
        return first is not None and (first.device.type, first.dtype, name) in self.wrong

    def recorded(self, *inputs: Tensor | None, **options: object) -> str:
        """Name of the implementation that runs a call under `recorded_forms`."""
        right = [
            name
            for name in self.recordable()
            if self.implementations[name].unsupported_reason(*inputs, **options) is None
            and not (self.wrong and self._was_wrong(name, inputs))
        ]
        preferred = (n for n in right if self.implementations[n].not_preferred_reason(*inputs, **options) is None)
        # The shipped table may prefer `native` to `lean`; a compiler has no use for it.
        return next(preferred, "lean" if "lean" in right else "torch")

    def recordable(self) -> tuple[str, ...]:
        """Implementations that a recording may have, by the shipped table: what a compiler can fuse, if there is any.

        `torch` comes after the others, and launches of Triton leave no operation in a graph.
        """
        if "lean" in self.implementations:
            return tuple(name for name in ("winograd", "fused", "lean") if name in self.implementations)
        return tuple(name for name in self.implementations if name not in ("triton", "torch"))

    def _candidates(self, device: str | None) -> list[tuple[str, Implementation]]:
        found = [(n, it) for n, it in self.implementations.items() if device is None or it.device in (None, device)]
        self._by_device[device] = found
        return found

    def allows_fast_path(
        self, backend: str | None, *inputs: Tensor | None, known: object = None, **options: object
    ) -> bool:
        """Whether no implementation is requested and the call is eager, differentiated in reverse mode at most.

        The smallest inputs may then skip `choose`, which would take as long as their PyTorch ops, and run `native`,
        unless another one was measured to be faster. Where a checkpoint watches what is saved, they may not
        (`autograd.form_tag`).

        Args:
            backend: the caller's request, or None.
            inputs: the tensors of the call.
            known: what tells the class of a call and takes less time to make than that; or None.
            options: other arguments of the call.
        """
        if backend is not None or in_transform() or in_forward_mode() or _requests() or saved_tensors_are_hooked():
            return False
        if known is not None and known in self.native_calls:
            return True
        if _decide is None or self.classify is None or _deterministic() or not is_measurable(inputs[0]):
            return True
        key = self.classify(*inputs, **options)
        decision = None if key is None else self.decisions.get(key, _UNKNOWN)
        native = decision is None or decision.candidates[0][0] == "native"
        if native and known is not None and len(self.native_calls) < 4096:
            self.native_calls.add(known)
        return native

    def requested(self, backend: str | None) -> str | None:
        """The implementation that is requested by name for a call with this `backend`, if any."""
        if backend is not None:
            return backend
        requested = _requests()
        if not requested:
            return None
        # use_backend may name an implementation that this op lacks: its block may contain calls of many ops.
        everywhere = requested.get("*")
        return requested.get(self.name) or (everywhere if everywhere in self.implementations else None)

    def explain(self, *inputs: Tensor | None) -> dict[str, str]:
        """Implementation -> what it is and why it would run or not, beginning with the one that would run.

        It measures nothing.
        """
        decision, open_to_measurement = None, _decide and not _deterministic() and _requests().get("*") != _SHIPPED
        if open_to_measurement and self.classify is not None and inputs and is_measurable(inputs[0]):
            decision = self.decisions.get(self.classify(*inputs) or ())
        fixed = self.requested(None) is not None or is_recorded()
        if fixed or in_transform() or in_forward_mode():
            chosen, by = self.choose(None, *inputs), "requested, or all that can run in this context"
        elif decision is None:
            chosen, by = self.shipped(*inputs), "by the shipped table"
        else:
            right = (name for name, it in decision.candidates if it.unsupported_reason(*inputs) is None)
            chosen, by = next(right, "torch"), "by measurement"
        lines = {chosen: f"{self.implementations[chosen].note}; {by}"}
        for name, it in self.implementations.items():
            if name == chosen:
                continue
            reason = it.unsupported_reason(*inputs)
            if reason is not None:
                lines[name] = f"{it.note}; cannot run: {reason}"
            else:
                reason = decision.reasons.get(name) if decision else it.not_preferred_reason(*inputs)
                lines[name] = f"{it.note}; can run, not the default: {reason or f'{chosen} comes first'}"
        return lines


def is_measurable(x: Tensor | None) -> bool:
    """Whether calls on x can be measured: it is a dense tensor itself, not of a subclass, on a device that we know."""
    plain = x.__class__ is Tensor or x.__class__ is torch.nn.Parameter
    return plain and x.layout is torch.strided and (x.is_cpu or x.is_cuda)  # type: ignore[union-attr]


def backends(op: str, *inputs: Tensor | None) -> dict[str, str]:
    """What can run `op`, and why.

    Args:
        op: name of a function of `fastgan.ops`.
        inputs: the tensors of a call, in its order; without them the answer is about the machine alone.

    Returns:
        Implementation -> description and reason, beginning with the one that would run.

    Raises:
        ValueError: `op` is not an op of this package.
    """
    _require_op(op)
    return OPS[op].explain(*inputs)


@contextlib.contextmanager
def use_backend(backend: str | None = None, /, **ops: str) -> Iterator[None]:
    """Run ops in the named implementation inside a `with` block, in this thread.

    `use_backend("torch")` requests it of every op that has such an implementation, `use_backend(pixel_norm="cpp")` of
    one; a call's own `backend=` has precedence. Second derivatives run where their forward did. `torch.compile` does
    not see the request: it compiles the plain PyTorch form unless the call itself names a kernel with `backend=`.

    Raises:
        ValueError: an unknown implementation or op. An op that cannot run as requested raises when it is called.
    """
    for name in (backend, *ops.values()):
        if name is not None and name not in PREFERENCE:
            raise ValueError(f"backend must be one of {', '.join(PREFERENCE)}, got {name!r}")
    for name in ops:
        _require_op(name)
    # A request for every op replaces all requests of outer blocks.
    with _request({"*": backend, **ops} if backend else {**_requested.get(), **ops}):
        yield


@contextlib.contextmanager
def recorded_forms() -> Iterator[None]:
    """Run ops in a `with` block as a recorded graph is to have them (`fastgan.compiled.recording`), in this thread.

    PyTorch's kernels with lean derivatives, which a compiler can fuse with the rest; of ops that have none, what the
    shipped table says. Nothing is measured and no measurement counts, so that the same calls are the same graph in
    every process that has equal `forms_of_recordings`. What is requested by name inside the block has precedence.
    """
    with _request({"*": _RECORDED}):
        yield


@contextlib.contextmanager
def by_shipped_table() -> Iterator[None]:
    """Run ops in a `with` block by the shipped table, in this thread: nothing is measured, no measurement counts.

    What is requested by name, around the block or inside it, has precedence.
    """
    with _request({"*": _SHIPPED, **_requested.get()}):
        yield


@contextlib.contextmanager
def _request(requests: Mapping[str, str]) -> Iterator[None]:
    token = _requested.set(requests)
    _open.append(requests)
    try:
        yield
    finally:
        _requested.reset(token)
        del _open[next(i for i in reversed(range(len(_open))) if _open[i] is requests)]


def _require_op(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
