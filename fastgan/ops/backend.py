"""Which implementation of an op runs, and why: one mechanism for every op of the package.

Each op has a plain PyTorch form, `torch`, its reference and its fallback, and beside it the kernels that exist:
`lean` (PyTorch's kernels under our autograd), `chunked` (PyTorch, little memory), `cpp` (C++ on CPUs), `cuda` and
`triton` (GPUs). An op's file lists them in the
order they are preferred. The first that can run the given inputs, and is worth it there, runs; `backend=` of a call
or `use_backend` around it asks for one by name, and then what cannot run raises instead of giving way to another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMES = ("torch", "lean", "chunked", "cpp", "cuda", "triton")

# Called with the tensors of one call (and options that an op's kernels may lack), or with none to ask about the machine
# alone; the answer is None, or why not.
Judge = Callable[..., str | None]

_asked: ContextVar[Mapping[str, str]] = ContextVar("fastgan_backend", default=MappingProxyType({}))  # "*": every op


def _always(*inputs: Tensor | None, **options: object) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Args:
        unsupported_reason: why it cannot run these inputs on this machine; None when it can.
        not_preferred_reason: why it is not the default for them though it can run them (a crossover that was measured).
        note: what it is, for people.
        describe_call: what exactly it would do with these inputs, where that depends on them; for people.
        device: the only type of device it runs on, if there is one; by default it is not considered for others.
    """

    unsupported_reason: Judge = _always
    not_preferred_reason: Judge = _always
    note: str = ""
    describe_call: Judge = _always
    device: str | None = None


REFERENCE = Implementation(note="the reference, in plain PyTorch")

LEAN = Implementation(note="PyTorch's kernels; second derivatives that are zero are skipped")

OPS: dict[str, Op] = {}


class Op:
    """The implementations of one op, in order of preference; the last is `torch`, which runs anything.

    `forward_mode` says that the others can be differentiated in forward mode (`torch.autograd.forward_ad`) as well.
    """

    def __init__(
        self, name: str, implementations: dict[str, Implementation] | None = None, forward_mode: bool = False
    ) -> None:
        self.name = name
        self.forward_mode = forward_mode
        self.implementations = {**(implementations or {}), "torch": REFERENCE}
        assert set(self.implementations) <= set(NAMES)
        # Device type -> the implementations that may run there, in order.
        self._on: dict[str | None, list[tuple[str, Implementation]]] = {}
        OPS[name] = self

    def choose(self, backend: str | None, *inputs: Tensor | None, **options: object) -> str:
        """Name of the implementation that runs `inputs`; `backend` is the caller's wish, or None.

        `options` are other arguments of the call, for judges of this op that look at them.

        Raises:
            ValueError: the wish, or that of `use_backend`, names no implementation of this op or one that cannot run.
        """
        if backend is None and (transformed() or (forward_mode() and not self.forward_mode)):
            return "torch"
        wish = self.asked(backend)
        if wish is None:
            device = inputs[0].device.type if inputs and inputs[0] is not None else None
            for name, it in self._on.get(device) or self._find(device):
                if (
                    it.unsupported_reason(*inputs, **options) is None
                    and it.not_preferred_reason(*inputs, **options) is None
                ):
                    return name
        if wish not in self.implementations:
            raise ValueError(f"backend must be {', '.join(self.implementations)} for {self.name}, got {wish!r}")
        reason = self.implementations[wish].unsupported_reason(*inputs, **options)
        if reason is not None:
            able = [
                name for name, it in self.implementations.items() if it.unsupported_reason(*inputs, **options) is None
            ]
            raise ValueError(f"backend: was {wish!r}, but {reason}; here it may be {', '.join(able)}")
        return wish

    def _find(self, device: str | None) -> list[tuple[str, Implementation]]:
        found = [(n, it) for n, it in self.implementations.items() if device is None or it.device in (None, device)]
        self._on[device] = found
        return found

    def free(self, backend: str | None) -> bool:
        """Whether nobody asks for an implementation and nothing but eager autograd follows the call.

        Ops whose smallest inputs take a form of PyTorch's own ask this first: `choose` would cost as much as that form.
        """
        return backend is None and not transformed() and not forward_mode() and not _asked.get()

    def asked(self, backend: str | None) -> str | None:
        """Which implementation a call with this `backend` asks for by name, if any."""
        if backend is not None:
            return backend
        asked = _asked.get()
        # What use_backend names but this op lacks is no error: it stands around calls of many ops.
        return (asked.get(self.name) or self._known(asked.get("*"))) if asked else None

    def explain(self, *inputs: Tensor | None) -> dict[str, str]:
        """Implementation -> what it is and why it would run or not, beginning with the one that would run."""
        chosen = self.choose(None, *inputs)
        found = {}
        for name in (chosen, *self.implementations):
            it = self.implementations[name]
            reason = it.unsupported_reason(*inputs)
            if name == chosen:
                does = it.describe_call(*inputs)
                found[name] = f"{it.note}: {does}" if does else it.note
            elif reason is not None:
                found[name] = f"{it.note}; cannot run: {reason}"
            elif name not in found:
                why = it.not_preferred_reason(*inputs) or f"{chosen} comes first"
                found[name] = f"{it.note}; can run, not the default: {why}"
        return found

    def _known(self, name: str | None) -> str | None:
        return name if name in self.implementations else None


_is_compiling = torch.compiler.is_compiling
_interpreters = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
_is_tracing = torch._C._is_tracing  # torch.jit.is_tracing asks first whether it is being compiled itself


def transformed() -> bool:
    """Whether the caller is being compiled, exported or traced, or is inside torch.func.grad, vmap or jvp.

    A compiler fuses plain PyTorch itself and takes no second derivative; an exported or traced program runs where our
    kernels are not; the others cannot enter autograd Functions that have no rule for them. All get plain PyTorch.
    """
    return _is_compiling() or _is_tracing() or _interpreters() is not None


def forward_mode() -> bool:
    """Inside `torch.autograd.forward_ad.dual_level`."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def backends(op: str, *inputs: Tensor | None) -> dict[str, str]:
    """What can run `op` and why: implementation -> reason, beginning with the one that would run.

    Args:
        op: name of a function of `fastgan.ops`.
        inputs: the tensors of a call, in its order; without them only the machine is judged.

    Raises:
        ValueError: `op` is no op of this package.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return OPS[op].explain(*inputs)


@contextlib.contextmanager
def use_backend(backend: str | None = None, /, **ops: str) -> Iterator[None]:
    """Run ops in the named implementation inside a `with` block, in this thread.

    `use_backend("torch")` asks it of every op that has such an implementation, `use_backend(pixel_norm="cpp")` of one;
    a call's own `backend=` comes first. Second derivatives run where their forward did. `torch.compile` does not see
    it: there the plain PyTorch form is compiled unless the call itself names a kernel with `backend=`.

    Raises:
        ValueError: an unknown implementation or op. An op that cannot run as asked raises when it is called.
    """
    for name in (backend, *ops.values()):
        if name is not None and name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    for name in ops:
        if name not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
    # A name for every op replaces whatever was asked further out.
    token = _asked.set({"*": backend, **ops} if backend else {**_asked.get(), **ops})
    try:
        yield
    finally:
        _asked.reset(token)
