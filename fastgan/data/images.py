"""Image files to pixels, and back: is a file whole, what mode and size it has, how it becomes a square; sheets.

Pillow is imported where it is used, so that a missing one stops only what needs it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Resampling

logger = logging.getLogger(__name__)


class Checked(NamedTuple):
    """What opening an image file told.

    reason: why it is none, or "". mode and kind: Pillow's, as in "RGB" and "JPEG". size: width and height, px.
    transparent: whether a color is, besides what the mode says.
    """

    reason: str
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    transparent: bool = False


def check(open_file: Callable[[], BinaryIO], name: str) -> Checked:
    """Look at one file, and decode it unless less is enough to tell that it is whole. `name` is for the log."""
    from PIL import Image

    try:
        with open_file() as stream, Image.open(stream) as image:
            mode, size, kind = image.mode, image.size, image.format or ""
            transparent = "transparency" in image.info
            image.verify()
        # `verify` reads all of a PNG, and opening all of a WebP; neither finds a cut in any other kind, so that a
        # damaged one would come to light in the middle of a run. A JPEG cut short lacks the end mark; some cameras
        # write more after it, so only one without it is decoded to know.
        if kind not in ("PNG", "WEBP"):
            with open_file() as stream:
                if kind not in ("JPEG", "MPO") or not _ends_whole(stream):
                    with Image.open(stream) as image:
                        image.load()
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        logger.debug("%s is skipped", name, exc_info=True)
        return Checked(undecodable(error))
    return Checked("", mode, size, kind, transparent)


def _ends_whole(stream: BinaryIO) -> bool:
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1024))
    end = stream.read()
    stream.seek(0)
    return b"\xff\xd9" in end


def decode(
    stream: BinaryIO, side: int, channels: int, *, shrink: Resampling | None = None, fit: bool = False
) -> np.ndarray:
    """One image file as uint8 [channels, side, side], channels 1 or 3: upright, its center square, resized.

    shrink: Pillow's filter for larger images, None for Lanczos. fit: the whole image, centered on black, instead
    of its center square.
    """
    from PIL import Image, ImageOps

    image: Image.Image
    with Image.open(stream) as image:
        extent = max(image.size) if fit else min(image.size)
        if extent >= 4 * side:
            # A JPEG far larger than needed is decoded at 1/2, 1/4 or 1/8; the filter does the last halving.
            width, height = (2 * side * length // extent for length in image.size)
            image.draft(None, (width, height))
        image.load()
        with suppress(Exception):  # a damaged EXIF block says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        image = convert(image, "L" if channels == 1 else "RGB")
        pixels = np.array(square(image, side, shrink, fit))
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow mode to L or RGB. 16-bit gray is scaled, transparency laid over white."""
    from PIL import Image

    if image.mode[0] in "IF":
        # I;16 and its kin, I (16 bits in 32), F (0 to 1, or to 255): Pillow's own convert clips at 255.
        values, clear = np.asarray(image, dtype=np.float32), image.info.get("transparency")
        largest = values.max(where=np.isfinite(values), initial=0)
        top = 65535 if image.mode[0] == "I" else 255 if largest > 1 else 1
        levels = np.rint(np.clip(np.nan_to_num(values) / top, 0, 1) * 255).astype(np.uint8)
        if isinstance(clear, int):  # the one value that is transparent
            levels[values == clear] = 255
        image = Image.fromarray(levels)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def square(image: Image.Image, side: int, shrink: Resampling | None = None, fit: bool = False) -> Image.Image:
    """The center square, resized; Pillow's filters widen when shrinking, so nothing aliases; see `decode`."""
    from PIL import Image
    from PIL.Image import Resampling

    width, height = image.size
    extent = max(width, height) if fit else min(width, height)
    # Enlarging with Lanczos rings visibly around strokes, bicubic hardly.
    smooth = (Resampling.LANCZOS if shrink is None else shrink) if extent > side else Resampling.BICUBIC
    if fit and width != height:
        inner = max(1, round(width * side / extent)), max(1, round(height * side / extent))
        whole = image if inner == image.size else image.resize(inner, smooth)
        image = Image.new(image.mode, (side, side))
        image.paste(whole, ((side - inner[0]) // 2, (side - inner[1]) // 2))
        return image
    left, top = (width - extent) // 2, (height - extent) // 2
    if extent == side:
        return image.crop((left, top, left + side, top + side))
    return image.resize((side, side), smooth, box=(left, top, left + extent, top + extent))


def is_gray(mode: str) -> bool:
    return mode in ("1", "L", "LA", "F") or mode.startswith("I")


def area_average(images: np.ndarray, resolution: int) -> np.ndarray:
    """Shrink uint8 [..., R, R] to [..., resolution, resolution]: the mean of each square block, rounded.

    In integers, so that it gives the same bytes for one image and for a stack, on any machine.
    """
    return pyramid(images, [resolution])[resolution]


def pyramid(images: np.ndarray, resolutions: Iterable[int]) -> dict[int, np.ndarray]:
    """`area_average` at each of `resolutions`, for little more than the work of the largest."""
    total, block, out = images, 1, {}
    for resolution in sorted(resolutions, reverse=True):
        while total.shape[-1] > resolution:
            block *= 2
            total = _halved(total, block)
        out[resolution] = images if block == 1 else _mean(total, block)
    return out


def _halved(total: np.ndarray, block: int) -> np.ndarray:
    """Exact sums of 2 x 2, [..., h, w] to [..., h / 2, w / 2]; each is one of block x block bytes then."""
    dtype = np.uint16 if block <= 16 else np.uint32  # 256 bytes fit 16 bits
    rows = np.add(total[..., ::2, :], total[..., 1::2, :], dtype=dtype)  # first, as rows are contiguous
    return np.add(rows[..., ::2], rows[..., 1::2], dtype=dtype)


def _mean(total: np.ndarray, block: int) -> np.ndarray:
    """The sums of blocks of block x block bytes, divided and rounded: uint8."""
    count = block * block
    # A shift, as count is a power of four; 16 bits hold the largest sum with its rounding.
    return ((total + total.dtype.type(count // 2)) >> total.dtype.type(2 * (block.bit_length() - 1))).astype(np.uint8)


def save_sheet(pixels: np.ndarray, path: Path, *, size: int | None = None, columns: int | None = None) -> None:
    """Write uint8 [N, C, R, R], C 1 or 3, as one PNG, near-square, row by row, replacing `path` atomically.

    `size` enlarges each image to that many pixels by repetition.
    """
    from PIL import Image

    n, c, r, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, (size or r) // r)
    sheet = np.zeros((rows * columns, c, r, r), dtype=np.uint8)
    sheet[:n] = pixels
    sheet = sheet.reshape(rows, columns, c, r, r).transpose(0, 3, 1, 4, 2).reshape(rows * r, columns * r, c)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    partial = path.with_name(f".{path.name}.part")
    try:
        Image.fromarray(sheet[:, :, 0] if c == 1 else sheet).save(partial, format="PNG")
        os.replace(partial, path)
    except BaseException:  # a full disk, a folder of that name, an interrupt
        partial.unlink(missing_ok=True)
        raise


def undecodable(error: Exception) -> str:
    """Why Pillow could not open or decode an image, in a line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image format Pillow knows"
    # Without the path, which is another one in another place.
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
