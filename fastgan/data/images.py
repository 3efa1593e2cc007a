"""Image files and pixels: is a file complete, which mode and size it has, how it is decoded to pixels.

Pillow is imported inside functions, so that only what needs it fails without it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from fastgan.data.framing import CROP, Framing

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
    stream: BinaryIO, side: int, channels: int, *, shrink: Resampling | None = None, framing: Framing = CROP
) -> np.ndarray:
    """Decode one image file: upright, made a square, resized.

    Args:
        stream: the file.
        side: of the result, px.
        channels: 1, 3 or 4.
        shrink: Pillow's filter for larger images; None: Lanczos.
        framing: how it becomes a square, and what is behind its transparent parts.

    Returns:
        uint8 [channels, side, side]; 4 channels are RGBA, the colors multiplied by alpha.
    """
    from PIL import Image, ImageOps

    image: Image.Image
    with Image.open(stream) as image:
        extent = framing.extent(image.size)
        if extent >= 4 * side:
            # A JPEG far larger than needed is decoded at 1/2, 1/4 or 1/8; the filter does the last halving.
            width, height = (2 * side * length // extent for length in image.size)
            image.draft(None, (width, height))
        image.load()
        with suppress(Exception):  # a damaged EXIF block does not damage the pixels
            ImageOps.exif_transpose(image, in_place=True)
        image = convert(image, {1: "L", 3: "RGB", 4: "RGBa"}[channels], framing.background)
        pixels = np.array(framing.square(image, side, shrink))
        if channels == 4:  # the filter overshoots in each channel by itself
            np.minimum(pixels[..., :3], pixels[..., 3:], out=pixels[..., :3])
        return channels_first(pixels)


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[h, w] or [h, w, C] to contiguous [C, h, w]."""
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def channels_last(pixels: np.ndarray) -> np.ndarray:
    """[1, h, w] to [h, w], and [C, h, w] to contiguous [h, w, C], as Pillow stores images."""
    return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def convert(image: Image.Image, mode: str, background: str = "white") -> Image.Image:
    """Convert any Pillow mode to L, RGB or RGBa. 16-bit gray is scaled.

    Transparent images are put on `background`; in RGBa, colors multiplied by alpha, they stay transparent.
    """
    from PIL import Image

    if image.mode[0] in "IF":
        # I;16 and its variants, I (16 bits in 32), F (0 to 1, or to 255): Pillow's own convert clips at 255.
        values, clear = np.asarray(image, dtype=np.float32), image.info.get("transparency")
        largest = values.max(where=np.isfinite(values), initial=0)
        top = 65535 if image.mode[0] == "I" else 255 if largest > 1 else 1
        levels = np.rint(np.clip(np.nan_to_num(values) / top, 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(levels)
        if isinstance(clear, int):  # one value is transparent
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if mode != "RGBa":
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if mode == "RGBa":  # not every mode has a direct way
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def has_alpha(info: ImageInfo) -> bool:
    """Return whether an image may have transparent parts."""
    return info.transparent or info.mode in ("RGBA", "LA", "PA", "RGBa", "La")


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
