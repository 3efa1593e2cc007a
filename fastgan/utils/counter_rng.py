"""Random numbers that belong to a sample, computed from (seed, stream, sample index) alone.

A latent, an interpolation weight or a fake label must not depend on the rank that draws it, on the number of
ranks or on what was drawn before: the same run on one process or on eight, stopped and resumed or not, sees the
same numbers. A counter-based generator gives that: the 64-bit finalizer of SplitMix64 (`splitmix`) over the counter, in
int64 tensor arithmetic, so that it runs on the samples' device and reads nothing back to the host.

These operations define the numbers. A GPU draws them in one kernel, where it has the same bits (`counter_kernels`).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from fastgan.utils import counter_kernels
from fastgan.utils.splitmix import GOLDEN_GAMMA, shift_right, splitmix64


def _key(seed: int, stream: str) -> int:
    """A 64-bit key of seed and stream. Hashed, since added to a counter nearby seeds would be shifts of each other."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {stream}".encode(), digest_size=8).digest(), "little", signed=True)


class StreamKeys:
    """A seed whose keys are tensors: what is recorded with it in place of an int runs with any seed.

    Args:
        seed: the int that it stands for.
        device: of the keys.

    Attributes:
        tensors: int64 scalars by stream, those that have been used.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self.tensors: dict[str, Tensor] = {}

    def __getitem__(self, stream: str) -> Tensor:
        if stream not in self.tensors:
            self.tensors[stream] = torch.tensor(_key(self._seed, stream), dtype=torch.int64, device=self._device)
        return self.tensors[stream]


Seed = int | StreamKeys
Key = int | Tensor


def _bits(key: Key, index: Tensor, size: int) -> Tensor:
    """64 random bits for each sample and position: int64 [N, size] for `index` int64 [N]."""
    per_sample = splitmix64(index.to(torch.int64) * GOLDEN_GAMMA + key)
    counter = torch.arange(1, size + 1, device=index.device, dtype=torch.int64) * GOLDEN_GAMMA
    return splitmix64(per_sample[:, None] + counter)


def _unit(bits24: Tensor) -> Tensor:
    """24 bits, of which 23 are used, to float32 in the open interval (0, 1): with 24 the largest would round to 1."""
    return ((bits24 >> 1).to(torch.float32) + 0.5) * 2.0**-23


def _uniform(key: Key, index: Tensor, size: int) -> Tensor:
    return _unit(shift_right(_bits(key, index, size), 40))


def _normal(key: Key, index: Tensor, size: int) -> Tensor:
    bits = _bits(key, index, (size + 1) // 2)
    radius = torch.sqrt(-2.0 * torch.log(_unit(shift_right(bits, 40))))
    angle = (2.0 * math.pi) * _unit(bits & 0xFFFFFF)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :size]


def _integers(key: Key, index: Tensor, high: int) -> Tensor:
    return (shift_right(_bits(key, index, 1)[:, 0], 32) * high) >> 32


DEFINITION = {"uniform": _uniform, "normal": _normal, "integers": _integers}


def _kernels(index: Tensor) -> Any:
    """The module of the kernels, where they draw for `index`."""
    return counter_kernels.usable(index, DEFINITION) if index.is_cuda else None


def _draw(name: str, seed: Seed, stream: str, index: Tensor, size: int) -> Tensor:
    if isinstance(seed, StreamKeys):  # for a recording, which kernels do not enter
        return DEFINITION[name](seed[stream], index, size)
    kernels = _kernels(index)
    draw = DEFINITION[name] if kernels is None else getattr(kernels, name)
    return draw(_key(seed, stream), index, size)


def uniform(seed: Seed, stream: str, index: Tensor, size: int) -> Tensor:
    """Uniform on (0, 1), float32 [N, size], for sample indices `index` (int64 [N]) of the named stream."""
    return _draw("uniform", seed, stream, index, size)


def normal(seed: Seed, stream: str, index: Tensor, size: int) -> Tensor:
    """Standard normal, float32 [N, size], by the Box-Muller transform; arguments as in `uniform`."""
    return _draw("normal", seed, stream, index, size)


def integers(seed: Seed, stream: str, index: Tensor, high: int) -> Tensor:
    """Uniform integers in [0, high), int64 [N]: one for each sample index."""
    return _draw("integers", seed, stream, index, high)
