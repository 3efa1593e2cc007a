"""Which implementation of an op runs: this file decides, for every op of the package.

Every op has a plain PyTorch implementation, `torch`, which is its reference and its fallback, and some of:

- `triton` and `cuda`: kernels for GPUs; `cpp`: kernels for CPUs (entries made in `fastgan.ops.kernel_registry`);
- `chunked`: plain PyTorch in blocks, with little memory;
- `lean`: PyTorch's kernels under an autograd Function that skips second derivatives which are zero.

`PREFERENCE` below is the order in which they are considered. The first one that supports a call
(`Implementation.unsupported_reason`) and is preferred for it (`not_preferred_reason`) runs: `Op.choose`. An op's file
lists the implementations that it has. `backend=` of a call or `use_backend` around it requests one by name, and then
one that cannot run raises instead of giving way to another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fastgan.ops.torch_private import (
    current_backward,
    in_forward_mode,
    is_tracing,
    peek_interpreter_stack,
    saved_tensors_are_hooked,
)

PREFERENCE = ("triton", "cuda", "cpp", "chunked", "lean", "torch")

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
    return _requested.get() or (_open[-1] if _open and current_backward() != -1 else {})


def _no_reason(*inputs: Tensor | None, **options: object) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        unsupported_reason: why it cannot run these inputs on this machine; None when it can.
        not_preferred_reason: why it is not the default for inputs that it can run (a measured crossover); None when
            it is.
        note: what it is, for `backends`.
        describe_call: what it does with these inputs, where that depends on them, for `backends`.
        device: the only device type that it runs on; None for any.
    """

    unsupported_reason: ReasonFn = _no_reason
    not_preferred_reason: ReasonFn = _no_reason
    note: str = ""
    describe_call: ReasonFn = _no_reason
    device: str | None = None


REFERENCE = Implementation(note="the reference, in plain PyTorch")

LEAN = Implementation(note="PyTorch's kernels; second derivatives that are zero are skipped")

OPS: dict[str, Op] = {}


class Op:
    """The implementations of one op; `torch`, which runs any call, is always among them.

    Args:
        name: of the public function.
        implementations: those besides `torch`, by name.
        supports_forward_mode: whether they can all be differentiated in forward mode (`torch.autograd.forward_ad`).
    """

    def __init__(
        self, name: str, implementations: dict[str, Implementation] | None = None, supports_forward_mode: bool = False
    ) -> None:
        every = {**(implementations or {}), "torch": REFERENCE}
        assert set(every) <= set(PREFERENCE)
        self.name = name
        self.supports_forward_mode = supports_forward_mode
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
        if backend is None and (in_transform() or (in_forward_mode() and not self.supports_forward_mode)):
            return "torch"
        requested = self.requested(backend)
        if requested is None:
            device = inputs[0].device.type if inputs and inputs[0] is not None else None
            for name, it in self._by_device.get(device) or self._candidates(device):
                if (
                    it.unsupported_reason(*inputs, **options) is None
                    and it.not_preferred_reason(*inputs, **options) is None
                ):
                    return name
        if requested not in self.implementations:
            raise ValueError(f"backend must be {', '.join(self.implementations)} for {self.name}, got {requested!r}")
        reason = self.implementations[requested].unsupported_reason(*inputs, **options)
        if reason is not None:
            reasons = {name: it.unsupported_reason(*inputs, **options) for name, it in self.implementations.items()}
            others = ", ".join(name for name, why in reasons.items() if why is None)
            raise ValueError(f"backend {requested!r}: {reason}; can run this call: {others}")
        return requested

    def _candidates(self, device: str | None) -> list[tuple[str, Implementation]]:
        found = [(n, it) for n, it in self.implementations.items() if device is None or it.device in (None, device)]
        self._by_device[device] = found
        return found

    def allows_fast_path(self, backend: str | None) -> bool:
        """Whether no implementation is requested and the call is eager, differentiated in reverse mode at most.

        The smallest inputs may then skip `choose`, which would take as long as their PyTorch ops. Where a checkpoint
        watches what is saved, they may not (`autograd.form_tag`).
        """
        return (
            backend is None
            and not in_transform()
            and not in_forward_mode()
            and not _requests()
            and not saved_tensors_are_hooked()
        )

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
        """Implementation -> what it is and why it would run or not, beginning with the one that would run."""
        chosen = self.choose(None, *inputs)
        described = self.implementations[chosen].describe_call(*inputs)
        note = self.implementations[chosen].note
        lines = {chosen: f"{note}: {described}" if described else note}
        for name, it in self.implementations.items():
            if name == chosen:
                continue
            reason = it.unsupported_reason(*inputs)
            if reason is not None:
                lines[name] = f"{it.note}; cannot run: {reason}"
            else:
                reason = it.not_preferred_reason(*inputs) or f"{chosen} comes first"
                lines[name] = f"{it.note}; can run, not the default: {reason}"
        return lines


_is_compiling = torch.compiler.is_compiling


def in_transform() -> bool:
    """Whether the caller is being compiled, exported or traced, or is inside torch.func.grad, vmap or jvp.

    A compiler fuses plain PyTorch itself and takes no second derivative; an exported or traced program runs where the
    kernels are not installed; a transform cannot enter autograd Functions that have no rule for it. All get plain
    PyTorch.
    """
    return _is_compiling() or is_tracing() or peek_interpreter_stack() is not None


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
    requests = {"*": backend, **ops} if backend else {**_requested.get(), **ops}
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
