"""A picture of generated images beside their nearest real ones: what a look for copies starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgan.data.sheets import save_sheet
from fastgan.evaluation.neighbors import nearest_real, own_distances

ROWS, COLUMNS, NEAREST = 16, 2, 3


def save_neighbors(
    generated: Tensor, real: Tensor, draw: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor], path: Path
) -> None:
    """Write a PNG: on the left the first `ROWS` generated images, on the right those nearest to a real one.

    Each is followed by its `NEAREST` real neighbors. Its label is its distance to the first, in multiples of the
    distance of that one to its own nearest real neighbor: below 1 counts as memorized (`neighbors.memorized_share`).

    Args:
        generated: features [N, D] of images 0 to N - 1 of `draw`.
        real: features [M, D] of images 0 to M - 1 of `read`, M > 1.
        draw, read: indices int64 [n] -> uint8 [n, C, R, R].

    Raises:
        OSError: it cannot be written.
    """
    nearest = min(NEAREST, len(real))
    distance, index = nearest_real(generated, real, nearest)
    ratio = distance[:, 0] / own_distances(real)[index[:, 0]].clamp(min=1e-12)
    rows = min(ROWS, len(generated))
    # Left and right alternate: a sheet is filled row by row.
    chosen = torch.stack([torch.arange(rows), ratio.argsort()[:rows]], dim=1).flatten()
    images = torch.cat([draw(chosen)[:, None], read(index[chosen].flatten()).unflatten(0, (-1, nearest))], dim=1)
    labels = [text for i in chosen.tolist() for text in (f"{i}: {ratio[i]:.2f}", *["real"] * nearest)]
    save_sheet(images.flatten(0, 1).numpy(), path, columns=COLUMNS * (1 + nearest), labels=labels)
