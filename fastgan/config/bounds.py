"""Bounds of configuration values, written in the annotation of a field: `width: Annotated[int, at_least(1)] = 64`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Bound:
    """A condition on a finite number.

    Args:
        holds: whether a value meets it.
        text: what the value must be, as in "must be at least 1".
    """

    holds: Callable[[float], bool]
    text: str


def at_least(least: float) -> Bound:
    return Bound(lambda value: value >= least, f"at least {least:g}")


def at_most(most: float) -> Bound:
    return Bound(lambda value: value <= most, f"at most {most:,}" if isinstance(most, int) else f"at most {most:g}")


def above(limit: float) -> Bound:
    return Bound(lambda value: value > limit, f"above {limit:g}")


def one_of(*values: int) -> Bound:
    first = ", ".join(map(str, values[:-1]))
    return Bound(lambda value: value in values, f"{first} or {values[-1]}")


COUNT = (at_least(1), at_most(2**31 - 1))
"""Bounds of a size or a number of things; some products of larger ones are no number of bytes."""


def violations(section: Any) -> Iterator[tuple[str, Any, str]]:
    """(field, value, what it must be) for each field of a dataclass whose value is out of bounds; None has none."""
    hints = get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        for bound in get_args(hints[field.name])[1:]:
            if not isinstance(bound, Bound) or value is None:
                continue
            finite = isinstance(value, int) or math.isfinite(value)
            if not (finite and bound.holds(value)):
                yield field.name, value, bound.text
