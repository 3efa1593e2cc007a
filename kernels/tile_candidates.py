"""The tiles to try for each kernel, and the writer of tiles.json."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from . import tiles
from .tiles import KINDS, Tile

SIZES = (16, 32, 64, 128, 256)
# Launcher -> its kernels, as named in tiles.json.
PASSES = {
    "forward": ("attention_forward",),
    "backward": ("attention_backward_rows", "attention_backward_columns"),
    "second backward": ("attention_second_statistics", "attention_second_rows", "attention_second_columns"),
    "scaled convolution, down": ("scaled_conv_down",),
    "scaled convolution, up": ("scaled_conv_up",),
    "scaled convolution, weight": ("scaled_conv_weight",),
}


def candidates(op: str, kind: str, size: int) -> Iterator[Tile]:
    """The tiles to try for kernel `op`, for numbers of `kind` and inner dimensions padded to `size`."""
    exact = kind == "float32"
    chunks: tuple[int, ...]
    if op.startswith("scaled_conv"):
        weight = op.endswith("weight")
        chunks = (16, 32, 64) if exact else (32, 64)
        sides, widths = (16, 32, 64, 128) if weight else (64, 128, 256), (16, 32, 64, 128)
        for rows, cols, warps, stages, chunk in itertools.product(sides, widths, (4, 8), (1, 2, 3, 4), chunks):
            if cols <= size and (rows <= size or not weight) and not (exact and stages > 1):
                yield Tile(rows, cols, warps, stages, chunk)
        return
    chunks = (0,) if kind == "half" and size < 256 else (0, 32, 64) if not exact else (16, 32)
    sides = (16, 32, 64) if exact else (16, 32, 64, 128)
    for rows, cols, warps, stages, chunk in itertools.product(sides, sides, (4, 8), (1, 2, 3), chunks):
        owned = cols if op.endswith("columns") else rows
        swept = rows if op.endswith("columns") else cols
        if swept <= owned and chunk <= size and not (exact and stages > 1):
            yield Tile(rows, cols, warps, stages, chunk)


def write_tiles(architecture: str, chosen: dict[str, dict[str, Tile]]) -> None:
    """Merge `chosen` (kernel -> key -> tile) into tiles.json, with one line per kernel and kind of numbers.

    Under an older Triton they are entered for it alone.
    """
    architecture += tiles.of_version()
    ops = {op: {**tiles.table().get(architecture, {}).get(op, {}), **entries} for op, entries in chosen.items()}
    table = {**tiles.table(), architecture: {**tiles.table().get(architecture, {}), **ops}}
    blocks = []
    for name in sorted(table):
        lines = []
        for op in sorted(table[name]):
            entries = table[name][op]
            names = [[f"{kind}/{size}{odd}" for size in SIZES] for kind in KINDS for odd in ("", "/odd")]
            rows = [", ".join(f'"{key}": {json.dumps(entries[key])}' for key in row if key in entries) for row in names]
            body = ",\n      ".join(row for row in rows if row)
            lines.append(f'    "{op}": {{\n      {body}\n    }}')
        blocks.append(f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }")
    new = tiles.TABLE.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    new.replace(tiles.TABLE)
    tiles.table.cache_clear()
