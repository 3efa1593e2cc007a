"""Mutated and forged contents of files, as a function of a seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

EVIL: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        7,
        2**31,
        2**53,
        2**63,
        10**18,
        -(10**18),
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "x" * 1000,
        "\x1b[31mred\x07",
        "a\nb",
        "../../../../tmp/escaped",
        "/etc/passwd",
        "\ud800",
        "é\u202e",
        "1e5",
        "nan",
    ),
    *([], {}, [[]], [0, 1], {"x": 1}, [None] * 50, {"first": 0, "count": 10**12}, ["__import__('os').system('true')"]),
    *(["a" * 300] * 3, {"__reduce__": "os.system"}, "!!python/object/apply:os.system ['true']"),
)
_WORDS = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\1\0", b"\n", b"{", b"[" * 2000, b"PK\1\2")


class Unchanged(random.Random):
    """A generator with which `mutated` and `forged` change nothing."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes of `content`: flipped, overwritten, removed, repeated, cut off."""
    if isinstance(rng, Unchanged):
        return content
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not changed:
            break
        at, length = rng.randrange(len(changed)), rng.choice((1, 1, 2, 4, 8, 64, 1024))
        way = rng.randrange(7)
        if way == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            changed[at : at + length] = rng.randbytes(min(length, len(changed) - at))
        elif way == 2:
            del changed[at : at + length]
        elif way == 3:
            changed[at:at] = changed[at : at + length]
        elif way == 4:
            word = rng.choice(_WORDS)
            changed[at : at + len(word)] = word
        elif way == 5:
            changed[at : at + length] = bytes(min(length, len(changed) - at))
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def forged(values: Any, rng: random.Random) -> Any:
    """Change one value of JSON, at any depth: replaced, removed, renamed, or another one's."""
    values = copy.deepcopy(values)
    if isinstance(rng, Unchanged):
        return values
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not places:
            return rng.choice(EVIL)
        node, key = rng.choice(places)
        if (isinstance(node, dict) and key not in node) or (isinstance(node, list) and key >= len(node)):
            continue
        way = rng.randrange(8)
        if way == 0 and isinstance(node, dict):
            del node[key]
        elif way == 1 and isinstance(node, dict):
            node[str(rng.choice(EVIL))] = node.pop(key)
        elif way == 2:
            other, where = rng.choice(places)
            if isinstance(other, dict) and where in other:
                node[key] = copy.deepcopy(other[where])
        elif way == 3 and isinstance(node[key], int) and not isinstance(node[key], bool):
            node[key] += rng.choice((-1, 1, 2, 1000))
        else:
            node[key] = copy.deepcopy(rng.choice(EVIL))
    return values if rng.random() > 0.02 else rng.choice(EVIL)


def as_json(values: Any) -> bytes:
    """JSON, also of numbers and texts that have none."""
    return json.dumps(values).encode()
