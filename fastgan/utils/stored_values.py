"""What the plain values in files of ours may be. They come from JSON that anybody may have written or edited."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
"""What reading JSON of unknown content raises: no JSON, other types, missing keys, 1e999, endless nesting."""


class Rule(NamedTuple):
    """A condition on a value.

    Attributes:
        holds: whether a value meets it.
        text: what the value must be, as in "must be a whole number from 0 to 9".
    """

    holds: Callable[[Any], bool]
    text: str


def whole(least: int, most: int) -> Rule:
    """A whole number in [least, most]."""
    return Rule(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
        f"a whole number from {least} to {most}",
    )


def text(longest: int = 200) -> Rule:
    """Printable text of up to `longest` characters."""
    return Rule(
        lambda value: isinstance(value, str) and len(value) <= longest and value.isprintable(),
        f"a text of at most {longest} characters",
    )


def choice(*values: Any) -> Rule:
    """One of `values`, and of their type."""
    return Rule(
        lambda value: any(type(value) is type(one) and value == one for one in values), " or ".join(map(repr, values))
    )


def texts(most: int) -> Rule:
    """A list of up to `most` printable texts."""
    one = text()
    return Rule(
        lambda value: isinstance(value, list) and len(value) <= most and all(map(one.holds, value)),
        f"a list of at most {most} texts",
    )


def mapping() -> Rule:
    """A JSON object."""
    return Rule(lambda value: isinstance(value, dict), "a mapping")


def _is_class(label: Any, order: Any) -> bool:
    """Whether a class of calls and its implementations are what `fastgan.ops.qualification.record` returns."""
    names = order is None or (isinstance(order, list) and all(text().holds(name) for name in order))
    return text().holds(label) and names


_RESOLUTION = choice(*[2**i for i in range(2, 11)])
_WIDTH = whole(1, 2**20)
NETWORKS: Mapping[str, Rule] = {
    "model": text(60),
    "resolution": _RESOLUTION,
    "channels": whole(1, 4),
    "latent": _WIDTH,
    "width": _WIDTH,
    "max_width": _WIDTH,
    "fmap_base": _WIDTH,
    "fmap_max": _WIDTH,
    "num_classes": whole(0, 2**20),
    "norm_g": choice("batch", "none"),
    "norm_d": choice("batch", "none"),
    "attention_at": choice(None, *[2**i for i in range(2, 11)]),
    "fused_scale": choice(True, False),
}
"""The arguments of `fastgan.models.build`."""
REQUIRED_NETWORKS = ("model", "resolution", "channels", "latent", "num_classes")

CHECKPOINT: Mapping[str, Rule] = {
    "version": text(),
    "variant": text(),
    "optimizer": text(),
    "images": whole(0, 10**15),
    "steps": whole(0, 2**31 - 2),
    "ema_steps": whole(0, 2**31 - 2),
    "resolution": _RESOLUTION,
    "world_size": whole(1, 10**6),
    "accumulation": whole(1, 10**6),
    "seed": whole(0, 2**51 - 1),
    "networks": mapping(),
    "classes": texts(2**20),
    "data": mapping(),
    "compiled": choice(True, False),
    "runaway": mapping(),
    "implementations": mapping(),
    "files": mapping(),
}
"""The plain values of a checkpoint."""
DATA: Mapping[str, Rule] = {"position": whole(0, 10**15), "seed": whole(0, 2**51 - 1), "fingerprint": text()}
"""Where a run stands in its data."""
FILE: Mapping[str, Rule] = {"bytes": whole(0, 2**62), "sha256": text(64)}
"""What is known of a file."""
IMPLEMENTATIONS: Mapping[str, Rule] = {
    "shipped": Rule(lambda value: value is None or text().holds(value), "null or a short text"),
    "machine": Rule(
        lambda value: (
            isinstance(value, dict) and len(value) <= 50 and all(text().holds(f"{k} {v}") for k, v in value.items())
        ),
        "a mapping of short values",
    ),
    "classes": Rule(
        lambda value: isinstance(value, dict) and all(_is_class(*item) for item in value.items()),
        "a mapping to lists of names, or null",
    ),
}
"""The implementations of the ops that a run uses."""
EXPORT: Mapping[str, Rule] = {
    **{name: text(1000) for name in ("version", "variant", "license", "data", "weights")},
    "images": whole(0, 10**15),
    "alpha": Rule(lambda value: isinstance(value, int | float) and 0 <= value <= 1, "a number from 0 to 1"),
    "batch": Rule(lambda value: value is None or whole(1, 2**20).holds(value), "a whole number of at least 1"),
}
"""The plain values of an exported file, besides its networks."""


def problem(values: Any, rules: Mapping[str, Rule], required: tuple[str, ...] = (), within: str = "") -> str:
    """The first value that breaks a rule, as in "steps must be a whole number from 0 to 9, got 'x'"; "" if none does.

    Args:
        values: by name; those without a rule may be anything.
        rules: by name.
        required: names that must be there.
        within: name of what the values are in, for the message.
    """
    if not isinstance(values, dict):
        return f"{within or 'it'} must be a mapping"
    prefix = f"{within}." if within else ""
    for name in required:
        if name not in values:
            return f"{prefix}{name} is missing"
    for name, rule in rules.items():
        if name in values and not rule.holds(values[name]):
            return f"{prefix}{name} must be {rule.text}, got {reprlib.repr(values[name])}"
    return ""


def networks_problem(networks: Any) -> str:
    """`problem` of arguments of `fastgan.models.build`."""
    return problem(networks, NETWORKS, REQUIRED_NETWORKS, "networks")


def export_problem(meta: Any) -> str:
    """`problem` of the plain values of an exported file."""
    found = problem(meta, {**EXPORT, "networks": mapping()}, ("networks",))
    return found or networks_problem(meta["networks"])


def checkpoint_problem(meta: dict[str, Any]) -> str:
    """`problem` of the plain values of a checkpoint, nested ones included; those that are missing are none."""
    found = problem(meta, CHECKPOINT)
    if not found and "networks" in meta:
        found = networks_problem(meta["networks"])
    if not found and "data" in meta:
        found = problem(meta["data"], DATA, ("fingerprint",), "data")
    if not found and "implementations" in meta:
        found = problem(meta["implementations"], IMPLEMENTATIONS, tuple(IMPLEMENTATIONS), "implementations")
    for name, record in meta.get("files", {}).items() if not found else ():
        found = found or problem(record, FILE, ("bytes", "sha256"), f"files.{name[:60]}")
    return found
