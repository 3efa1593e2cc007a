"""Which GPUs draw the numbers of `counter_rng` in one kernel: those on which it has the bits of torch's operations.

A stored run must draw the same numbers again, so a kernel is used on a device only after it was compared with torch's
operations there, once in a process, in some milliseconds: on every value that a radius and an angle can have, and on
ordinary draws. Where it differs in a bit, or cannot run, torch's operations draw, and that is said once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgan.utils.splitmix import GOLDEN_GAMMA, inverse64, unmix64
from fastgan.utils.system import device_name
from fastgan.utils.text import first_line
from fastgan.utils.torch_modes import is_plain

Draw = Callable[[int, Tensor, int], Tensor]
"""(key, sample indices [N], size or largest integer) -> numbers."""

_VALUES = 2**23  # of a number in (0, 1)
_CHUNK = 2**20
_UNIT_RADIUS = 5_087_947  # of these values, the one whose radius is nearest to 1: products show the bits of a cosine
_KEYS = (0x1234567890ABCDEF, -2, 77)

_usable: dict[torch.device, Any] = {}  # module of the kernels, or None


def usable(index: Tensor, definition: Mapping[str, Draw]) -> Any:
    """The module of the kernels that may draw for `index`, on a GPU, now; None where torch's operations have to.

    Args:
        index: the sample indices of a draw.
        definition: "uniform", "normal" and "integers" in torch's operations.
    """
    if not is_plain(index):
        return None
    device = index.device
    if device not in _usable:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # the comparison reads the device; the numbers are the same
        _usable[device] = _compared(device, definition)
    return _usable[device]


def _compared(device: torch.device, definition: Mapping[str, Draw]) -> Any:
    try:
        from fastgan.kernels import counter_rng as kernels
    except ImportError:  # Triton is for Linux
        return None
    try:
        wrong = first_difference(kernels, definition, device)
    except Exception as error:  # what fails here must not end a run
        wrong = f"{type(error).__name__}: {first_line(error)}"
    if wrong is None:
        return kernels
    print(
        "fastgan: random numbers are drawn by torch's operations, as the kernel is not usable on "
        f"{device_name(device)} ({wrong}); the numbers are right, a step launches more; please report it",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return None


def first_difference(kernels: Any, definition: Mapping[str, Draw], device: torch.device, step: int = 1) -> str | None:
    """The first draw in which kernels and definition differ in a bit; None where there is none.

    Args:
        kernels: has `uniform`, `normal` and `integers`.
        definition: the same in torch's operations.
        device: where they are compared.
        step: compare only every so many of all values.
    """
    for name, key, index, size in _draws(device, step):
        if not torch.equal(getattr(kernels, name)(key, index, size), definition[name](key, index, size)):
            return f"{name} differs, indices from {int(index[0])}, {size} numbers"
    return None


def _draws(device: torch.device, step: int) -> Iterator[tuple[str, int, Tensor, int]]:
    """Name, key, indices and size of the draws that are compared."""
    some = [*range(-3, 30), 2**31, 2**40, 2**62, -(2**63)]
    index = torch.tensor(some, dtype=torch.int64, device=device)
    for key in _KEYS:
        for size in (1, 2, 5, 512):
            yield from ((name, key, index, size) for name in ("uniform", "normal"))
        yield from (("integers", key, index, high) for high in (1, 10, 1000))
    for first in range(0, _VALUES, _CHUNK * step):
        values = torch.arange(first, min(first + _CHUNK * step, _VALUES), step, device=device)
        for bits in (values << 41, (torch.full_like(values, _UNIT_RADIUS) << 41) + (values << 1)):
            index = index_of(bits, _KEYS[0])
            yield "uniform", _KEYS[0], index, 1
            yield "normal", _KEYS[0], index, 2


# --- which sample gets which bits ------------------------------------------------------------------------------------


def index_of(bits: Tensor, key: int) -> Tensor:
    """The indices of the samples whose first 64 random bits are `bits`: int64 [N] for int64 [N]."""
    return (unmix64(unmix64(bits) - GOLDEN_GAMMA) - key) * inverse64(GOLDEN_GAMMA)
