"""Contact sheets: many images in one PNG, gray, in color or transparent, with a line of text below each."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgan.utils.files import write_atomic

if TYPE_CHECKING:
    from PIL import Image

LEAST_SIDE = 64
"""px of an image in a sheet: smaller ones are enlarged by a whole factor, without blur."""
_TEXT_HEIGHT = 14  # px
_FONT_SIZE = 11


def straight_alpha(pixels: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA to the straight one of PNG files: uint8 [..., 4, h, w], colors divided by alpha."""
    color, alpha = pixels[..., :3, :, :].astype(np.uint32), pixels[..., 3:, :, :].astype(np.uint32)
    divided = (np.minimum(color, alpha) * 255 + alpha // 2) // np.maximum(alpha, 1)
    return np.concatenate([divided, alpha], axis=-3).astype(np.uint8)


def sheet(pixels: np.ndarray, *, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Put images side by side, row by row.

    Args:
        pixels: uint8 [N, C, R, R], C 1, 3, or 4 (RGBA, premultiplied).
        columns: of the sheet; None: nearly square.
        scale: enlarges each image by repetition.

    Returns:
        uint8 [rows * R * scale, columns * R * scale, C], RGBA not premultiplied; empty places are 0.
    """
    n, c, r, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = np.zeros((rows * columns, c, r, r), dtype=np.uint8)
    cells[:n] = straight_alpha(pixels) if c == 4 else pixels
    whole = cells.reshape(rows, columns, c, r, r).transpose(0, 3, 1, 4, 2).reshape(rows * r, columns * r, c)
    return whole.repeat(scale, axis=0).repeat(scale, axis=1)


def save_sheet(
    pixels: np.ndarray,
    path: Path,
    *,
    size: int | None = None,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write images as one PNG, row by row, atomically.

    Args:
        pixels: uint8 [N, C, R, R], C 1, 3, or 4 (RGBA, premultiplied).
        path: of the PNG.
        size: an image is at least so large, px, and at least `LEAST_SIDE`: smaller ones are enlarged by repetition.
        columns: of the sheet; None: nearly square.
        labels: a text below each image, cut to its width; empty: none.
    """
    from PIL import Image

    n, _, r, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale = math.ceil(max(size or r, LEAST_SIDE) / r)
    whole = sheet(pixels, columns=columns, scale=scale)
    image = Image.fromarray(whole[:, :, 0] if whole.shape[2] == 1 else whole)
    if labels:
        image = labeled(image, labels, columns, scale * r)
    file = io.BytesIO()
    image.save(file, format="PNG")
    write_atomic(path, file.getbuffer())


def labeled(image: Image.Image, labels: Sequence[str], columns: int, side: int) -> Image.Image:
    """A sheet with a strip of text below each row of cells of `side` pixels."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    rows = image.height // side
    out = Image.new(image.mode, (image.width, rows * (side + _TEXT_HEIGHT)), "white")
    draw = ImageDraw.Draw(out)
    for row in range(rows):
        out.paste(image.crop((0, row * side, image.width, (row + 1) * side)), (0, row * (side + _TEXT_HEIGHT)))
        for column, text in enumerate(labels[row * columns : (row + 1) * columns]):
            text = "".join(letter if letter.isprintable() else "?" for letter in text)
            while text and draw.textlength(text, font=font) > side - 2:
                text = text[:-1]
            draw.text((column * side + 1, (row + 1) * (side + _TEXT_HEIGHT) - _TEXT_HEIGHT), text, "black", font)
    return out
