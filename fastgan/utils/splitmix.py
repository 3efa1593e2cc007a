"""SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) and its inverse."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

Words = TypeVar("Words", Tensor, np.ndarray)  # int64: torch has no uint64 arithmetic


def signed64(value: int) -> int:
    """Return the int64 with the same bits as the low 64 bits of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def inverse64(value: int) -> int:
    """Return the int64 whose product with the odd number `value` is 1, modulo 2^64."""
    return signed64(pow(value, -1, 2**64))


GOLDEN_GAMMA = signed64(0x9E3779B97F4A7C15)
_MULTIPLIERS = signed64(0xBF58476D1CE4E5B9), signed64(0x94D049BB133111EB)
_INVERSES = tuple(map(inverse64, _MULTIPLIERS))


def shift_right(x: Words, bits: int) -> Words:
    """Logical shift: `>>` on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Words) -> Words:
    """Apply the finalizer of SplitMix64 to int64 words, in torch or NumPy."""
    x = (x ^ shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ shift_right(x, 31)


def unmix64(x: Words) -> Words:
    """Return the words that `splitmix64` maps to x."""
    x = (x ^ shift_right(x, 31) ^ shift_right(x, 62)) * _INVERSES[1]
    x = (x ^ shift_right(x, 27) ^ shift_right(x, 54)) * _INVERSES[0]
    return x ^ shift_right(x, 30) ^ shift_right(x, 60)
