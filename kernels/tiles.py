"""Which tile a kernel runs with: looked up in tiles.json, never timed while a program runs.

tiles.json: architecture ("sm_90", or "default") -> operation -> kind of numbers and padded size ("half/64") -> the
fields of `Tile`. An entry "half/64/odd" is for tensors with strides that are no multiples of 16, and for images that
are not channels_last: their addresses are computed one by one, in more registers, and the tile of the others would
spill. `python -m fastgan.kernels.tune` measures and writes the entries of the GPU at hand. What was not measured yet is
the largest of a few usual tiles that compiles without spills: for attention `--ahead-of-time` finds it.
The entries of "default" fit into the 99 KiB of shared memory that the smallest supported GPUs have.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")

# half: float16 and bfloat16. float32: products exact in float32. tf32: float32 through tensor cores.
KINDS = ("half", "tf32", "float32")


class Tile(NamedTuple):
    rows: int
    cols: int
    warps: int
    stages: int
    chunk: int = 0  # features of a product at a time; 0: all


_given: dict[str, Tile] = {}


@functools.cache
def table() -> dict[str, dict[str, dict[str, Tile]]]:
    return {
        architecture: {op: {key: Tile(*it) for key, it in entries.items()} for op, entries in ops.items()}
        for architecture, ops in json.loads(TABLE.read_text()).items()
    }


@functools.cache
def architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    # 10.3 has the tensor cores, their memory and the shared memory of 10.0; of other families the first is the largest.
    return "sm_100" if major == 10 else f"sm_{major}{minor}"


def find(op: str, kind: str, size: int, device: torch.device, odd: bool = False) -> Tile:
    """The tile of `op` for numbers of `kind` and inner dimensions padded to `size` (a power of two); `odd`: strides."""
    return _given.get(op) or find_for(architecture(device), op, kind, size, odd)


def find_for(name: str, op: str, kind: str, size: int, odd: bool = False) -> Tile:
    """`find` for the architecture `name` of the table, whatever GPU is here."""
    key = f"{kind}/{size}"
    for it in (name, "default"):
        entries = table().get(it, {}).get(op, {})
        found = (entries.get(f"{key}/odd") if odd else None) or entries.get(key)
        if found:
            return found
    raise KeyError(f"{op} {key}")


@contextlib.contextmanager
def using(given: Mapping[str, Tile]) -> Iterator[None]:
    """Let operations run with other tiles than the table's, inside a `with` block: for tuning and for tests."""
    before = dict(_given)
    _given.update(given)
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)
