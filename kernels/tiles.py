"""The tile that a kernel runs with, looked up in tiles.json. Nothing is timed at run time.

tiles.json: architecture ("sm_90", or "default") -> kernel -> kind of numbers and padded size ("half/64") -> the fields
of `Tile`. An entry "half/64/odd" is for tensors with strides that are not multiples of 16, and for images that are not
channels_last: their addresses need more registers, and the other tile would spill. "sm_90, triton 3.6" and such has
the tiles that spill under versions before 3.8 and therefore differ there. `python -m fastgan.kernels.tune`
measures on the present GPU and writes its entries. Entries that were not measured are the largest of a few common tiles
that compile without spills; for attention, `--ahead-of-time` finds them. The entries of "default" fit in 99 KiB of
shared memory, which the smallest supported GPUs have.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")

# half: float16 and bfloat16. float32: exact float32 products. tf32: float32 on tensor cores.
KINDS = ("half", "tf32", "float32")


class Tile(NamedTuple):
    """Tile size and launch options of a kernel.

    Attributes:
        rows: rows of a tile (queries, pixels).
        cols: columns of a tile (keys, channels).
        warps: `num_warps` of the launch.
        stages: `num_stages` of the launch, the depth of software pipelining.
        chunk: features loaded at a time in a product; 0 means all.
    """

    rows: int
    cols: int
    warps: int
    stages: int
    chunk: int = 0


_overrides: dict[str, Tile] = {}
_OLD, _SINCE = ", triton 3.6", (3, 8)


@functools.cache
def table() -> dict[str, dict[str, dict[str, Tile]]]:
    """The contents of tiles.json."""
    return {
        architecture: {op: {key: Tile(*it) for key, it in entries.items()} for op, entries in ops.items()}
        for architecture, ops in json.loads(TABLE.read_text()).items()
    }


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture of a GPU as named in tiles.json; "default" for other devices."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    # sm_103 has the tensor cores, tensor memory and shared memory of sm_100. In other families these differ.
    return "sm_100" if major == 10 else f"sm_{major}{minor}"


@functools.cache
def of_version() -> str:
    """What is added to an architecture's name for tiles of the installed Triton, if it is an older one."""
    found = [int(it) for it in importlib.metadata.version("triton").split(".")[:2]]
    return _OLD if tuple(found) < _SINCE else ""


Place = tuple[str, Tile | None]
"""What decides between the tiles of a kernel besides its numbers: the architecture, and a tile that overrides all."""


def place(op: str, device: torch.device) -> Place:
    """Where kernel `op` runs."""
    return architecture(device), _overrides.get(op)


def lookup(op: str, kind: str, size: int, where: Place, odd: bool = False) -> Tile:
    """The tile of a kernel.

    Args:
        op: the kernel, as named in tiles.json.
        kind: one of `KINDS`.
        size: inner dimension, padded to a power of two.
        where: the kernel runs, as from `place`.
        odd: whether strides are not multiples of 16.

    Raises:
        KeyError: There is no entry, not even for "default".
    """
    return where[1] or lookup_for(where[0], op, kind, size, odd)


def lookup_for(name: str, op: str, kind: str, size: int, odd: bool = False) -> Tile:
    """`lookup` for an architecture by name."""
    key = f"{kind}/{size}"
    for it in dict.fromkeys((name + of_version(), name, "default" + of_version(), "default")):
        entries = table().get(it, {}).get(op, {})
        tile = (entries.get(f"{key}/odd") if odd else None) or entries.get(key)
        if tile:
            return tile
    raise KeyError(f"{op} {key}")


@contextlib.contextmanager
def override(overrides: Mapping[str, Tile]) -> Iterator[None]:
    """Inside the context, run kernels with the tiles in `overrides` (kernel -> tile): for tuning and tests."""
    before = dict(_overrides)
    _overrides.update(overrides)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
