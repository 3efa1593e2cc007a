"""Whether torch runs a call as it is written, or records, traces or transforms it: by private names of torch.

Each has a fallback where torch no longer has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def private(name: str) -> Any:
    """The object `torch.NAME`, or None where torch does not have it."""
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


# Not None inside torch.func.grad, vmap, jvp, ... No public function tells. Missing: no transform is detected, and an
# autograd Function without a rule for it raises there.
peek_interpreter_stack: Callable[[], Any] = private("_C._functorch.peek_interpreter_stack") or (lambda: None)

# torch.jit.is_tracing asks whether it is being compiled first, which takes longer. Missing: torch.jit.is_tracing.
is_tracing: Callable[[], bool] = private("_C._is_tracing") or torch.jit.is_tracing

# Dispatch modes that are active in this thread: make_fx, FakeTensorMode, counters of operations. Missing: as if there
# were one, so that nothing is measured but by `fastgan doctor --qualify`, and random numbers are drawn by torch's ops.
dispatch_modes: Callable[[], int] = private("_C._len_torch_dispatch_stack") or (lambda: 1)

_is_compiling = torch.compiler.is_compiling


def in_transform() -> bool:
    """Whether the caller is being compiled, exported or traced, or is inside torch.func.grad, vmap or jvp."""
    return _is_compiling() or is_tracing() or peek_interpreter_stack() is not None


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor itself, and what is done with it now is neither recorded nor transformed.

    Only then may it be given to a kernel that torch's dispatcher does not see.
    """
    return x.__class__ is Tensor and not dispatch_modes() and not in_transform()
