"""Image files and pixels: is a file complete, which mode and size it has, how it becomes a square; contact sheets.

Pillow is imported inside functions, so that only what needs it fails without it.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from fastgan.utils.files import write_atomic

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Resampling

logger = logging.getLogger(__name__)


class ImageInfo(NamedTuple):
    """What is known of an image file after opening it.

    Attributes:
        problem: why it is not a usable image, or "".
        mode: Pillow's, as in "RGB".
        size: width and height, px.
        format: Pillow's, as in "JPEG".
        transparent: one of its colors is transparent, besides what the mode tells.
    """

    problem: str
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    format: str = ""
    transparent: bool = False


def inspect_image(open_file: Callable[[], BinaryIO], name: str) -> ImageInfo:
    """Open one image file. It is decoded only if nothing cheaper shows whether it is complete.

    Args:
        open_file: opens the file from its start; may be called more than once.
        name: of the file in the log.
    """
    from PIL import Image

    try:
        with open_file() as stream, Image.open(stream) as image:
            mode, size, format_ = image.mode, image.size, image.format or ""
            transparent = "transparency" in image.info
            image.verify()
        # `verify` reads all of a PNG, and opening reads all of a WebP. Neither detects a truncated file of any other
        # format, which would stop a run later. A truncated JPEG lacks the end marker; some cameras write more data
        # after it. Only a JPEG without it is decoded.
        if format_ not in ("PNG", "WEBP"):
            with open_file() as stream:
                if format_ not in ("JPEG", "MPO") or not _has_jpeg_end(stream):
                    with Image.open(stream) as image:
                        image.load()
    except Exception as error:  # Pillow's readers raise nearly any exception on a damaged file
        logger.debug("%s is skipped", name, exc_info=True)
        return ImageInfo(decode_problem(error))
    return ImageInfo("", mode, size, format_, transparent)


def _has_jpeg_end(stream: BinaryIO) -> bool:
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1024))
    end = stream.read()
    stream.seek(0)
    return b"\xff\xd9" in end


def decode(
    stream: BinaryIO, side: int, channels: int, *, shrink: Resampling | None = None, fit: bool = False
) -> np.ndarray:
    """Decode one image file: upright, its center square, resized.

    Args:
        stream: the file.
        side: of the result, px.
        channels: 1 or 3.
        shrink: Pillow's filter for larger images; None: Lanczos.
        fit: keep the whole image, centered on black, instead of its center square.

    Returns:
        uint8 [channels, side, side].
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
        with suppress(Exception):  # a damaged EXIF block does not damage the pixels
            ImageOps.exif_transpose(image, in_place=True)
        image = convert(image, "L" if channels == 1 else "RGB")
        return channels_first(np.array(square(image, side, shrink, fit)))


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[h, w] or [h, w, C] to contiguous [C, h, w]."""
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def channels_last(pixels: np.ndarray) -> np.ndarray:
    """[1, h, w] to [h, w], and [3, h, w] to contiguous [h, w, 3], as Pillow stores images."""
    return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert any Pillow mode to L or RGB. 16-bit gray is scaled; transparent images are put on white."""
    from PIL import Image

    if image.mode[0] in "IF":
        # I;16 and its variants, I (16 bits in 32), F (0 to 1, or to 255): Pillow's own convert clips at 255.
        values, clear = np.asarray(image, dtype=np.float32), image.info.get("transparency")
        largest = values.max(where=np.isfinite(values), initial=0)
        top = 65535 if image.mode[0] == "I" else 255 if largest > 1 else 1
        levels = np.rint(np.clip(np.nan_to_num(values) / top, 0, 1) * 255).astype(np.uint8)
        if isinstance(clear, int):  # one value is transparent
            levels[values == clear] = 255
        image = Image.fromarray(levels)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def square(image: Image.Image, side: int, shrink: Resampling | None = None, fit: bool = False) -> Image.Image:
    """Resize the center square; see `decode`. Pillow's filters widen when shrinking, so nothing aliases."""
    from PIL import Image
    from PIL.Image import Resampling

    width, height = image.size
    extent = max(width, height) if fit else min(width, height)
    # Enlarged with Lanczos, strokes ring visibly; with bicubic hardly.
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
    """Return whether a mode of Pillow has no color."""
    return mode in ("1", "L", "LA", "F") or mode.startswith("I")


def area_average(images: np.ndarray, resolution: int) -> np.ndarray:
    """Shrink uint8 [..., R, R] to [..., resolution, resolution]: the mean of each square block, rounded.

    Computed in integers: the bytes are the same for one image and for a stack, on any machine.
    """
    return pyramid(images, [resolution])[resolution]


def pyramid(images: np.ndarray, resolutions: Iterable[int]) -> dict[int, np.ndarray]:
    """Return `area_average` at each of `resolutions`, for little more than the work of the largest."""
    total, block, out = images, 1, {}
    for resolution in sorted(resolutions, reverse=True):
        while total.shape[-1] > resolution:
            block *= 2
            total = _halved(total, block)
        out[resolution] = images if block == 1 else _mean(total, block)
    return out


def _halved(total: np.ndarray, block: int) -> np.ndarray:
    """Exact sums of 2 x 2, [..., h, w] to [..., h / 2, w / 2]; each result is the sum of block x block bytes."""
    dtype = np.uint16 if block <= 16 else np.uint32  # 256 bytes fit 16 bits
    rows = np.add(total[..., ::2, :], total[..., 1::2, :], dtype=dtype)  # rows first, which are contiguous
    return np.add(rows[..., ::2], rows[..., 1::2], dtype=dtype)


def _mean(total: np.ndarray, block: int) -> np.ndarray:
    """The sums of blocks of block x block bytes, divided and rounded: uint8."""
    count = block * block
    # A shift, as count is a power of four; 16 bits hold the largest sum with its rounding.
    return ((total + total.dtype.type(count // 2)) >> total.dtype.type(2 * (block.bit_length() - 1))).astype(np.uint8)


def save_sheet(pixels: np.ndarray, path: Path, *, size: int | None = None, columns: int | None = None) -> None:
    """Write images as one PNG, row by row, atomically.

    Args:
        pixels: uint8 [N, C, R, R], C 1 or 3.
        path: of the PNG.
        size: enlarges each image to that many pixels by repetition.
        columns: of the sheet; None: nearly square.
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
    file = io.BytesIO()
    Image.fromarray(sheet[:, :, 0] if c == 1 else sheet).save(file, format="PNG")
    write_atomic(path, file.getbuffer())


def decode_problem(error: Exception) -> str:
    """Return why Pillow could not open or decode an image, in one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image format Pillow knows"
    # Without the path, which differs between copies of a set.
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or the name of its class."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
