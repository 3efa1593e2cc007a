"""Image files and pixels: is a file complete, which mode and size it has, how it is decoded to pixels.

Pillow is imported inside functions, so that only what needs it fails without it.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from fastgan.data.faults import is_machine_fault, raise_if_machine
from fastgan.data.framing import CROP, Framing
from fastgan.errors import printable
from fastgan.utils.text import readable_size

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Resampling

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 2**29
"""Largest image file that is read: the pixels of the largest image that Pillow opens without a warning, 16-bit RGB."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "QOI"),
    *("ICO", "ICNS", "DDS", "PSD", "SGI", "PCX", "TGA"),
)
"""The formats of Pillow that are read, each by its content and whatever its name; TGA, which has no signature, last.

None of them starts a program or opens another file. Of Pillow's others EPS starts Ghostscript, IPTC opens what is in it
in any format, WMF is drawn by Windows, and FITS, FPX, MIC and the rest are not what sets of images are made of.
"""
UNREAD = "no image in a format that is read"
PIXELS_AT_ONCE = 2**25
"""Pixels that the threads of a process decode at once; a larger image is decoded alone."""
_BLOCK = 2**26  # bytes of an image that Pillow allocates at once
_BAND = 2**20  # pixels that are converted at once
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # of a JPEG, without stuffed zeros and restarts (T.81, B.1)
_QOI_END = bytes(7) + b"\1"


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


def read_whole(stream: BinaryIO) -> bytes:
    """Read one image file whole, so that what its decoder meets later is a property of the file.

    Raises:
        ValueError: it is larger than `MAX_FILE_BYTES`.
        OSError: the machine cannot read it.
    """
    size = stream.seek(0, os.SEEK_END)
    require_size(size)
    stream.seek(0)
    return stream.read()


def require_size(size: int) -> None:
    """Raise ValueError for a size, in bytes, that no image file of the sizes that Pillow opens has."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"too large: {readable_size(size)}, above {readable_size(MAX_FILE_BYTES)}")


def inspect_image(open_file: Callable[[], BinaryIO], name: str, flag: str = "--data") -> ImageInfo:
    """Decode one image file; a JPEG at an eighth of its size, which still reads all of it.

    Args:
        open_file: opens the file from its start.
        name: of the file in messages.
        flag: the argument to name in errors.

    Raises:
        ArgumentError: the machine cannot read the file now.
    """
    from PIL import Image

    try:
        with open_file() as stream, load_image(read_whole(stream), shrink_to=1) as (image, info):
            if info.mode == "I":
                convert(image, "L")  # refuses what is out of range
    except Exception as error:  # Pillow's readers raise nearly any exception on a damaged file
        raise_if_machine(error, flag, name)
        logger.debug("%s is skipped", name, exc_info=True)
        return ImageInfo(decode_problem(error))
    if Image.MAX_IMAGE_PIXELS is not None and info.size[0] * info.size[1] > Image.MAX_IMAGE_PIXELS:
        logger.warning(
            "%s is unusually large: %d x %d px; remove it if you do not know it", printable(name), *info.size
        )
    return info


@contextmanager
def load_image(
    content: bytes, shrink_to: int | None = None, framing: Framing = CROP, formats: tuple[str, ...] = FORMATS
) -> Iterator[tuple[Image.Image, ImageInfo]]:
    """Context of a decoded image; it waits while other threads decode `PIXELS_AT_ONCE`.

    Args:
        content: of the file.
        shrink_to: a JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8, not below this extent, px.
        framing: says what the extent of an image is.
        formats: see `open_image`.

    Yields:
        The image, which is closed at the end, and what its header says.

    Raises:
        Exception: nearly any, if the file is damaged.
    """
    with ExitStack() as held:
        try:
            loaded = _load(content, shrink_to, framing, formats, held)
        except ValueError:
            # Texts and color profiles of more than 1 MB are refused by Pillow, and are no part of the pixels.
            pixels = _without_text(content)
            if len(pixels) == len(content):
                raise
            held.close()
            loaded = _load(pixels, shrink_to, framing, formats, held)
        yield loaded


def _load(
    content: bytes, shrink_to: int | None, framing: Framing, formats: tuple[str, ...], held: ExitStack
) -> tuple[Image.Image, ImageInfo]:
    image = open_image(content, formats)
    info = ImageInfo("", image.mode, image.size, image.format or "", "transparency" in image.info)
    extent = framing.extent(image.size)
    if shrink_to is not None and extent >= 2 * shrink_to:
        width, height = (max(1, shrink_to * length // extent) for length in image.size)
        image.draft(None, (width, height))
    icon = info.format in ("ICO", "ICNS")  # holds a picture of any size, whatever size it states
    held.enter_context(_ROOM.taken(PIXELS_AT_ONCE if icon else image.width * image.height))
    held.callback(image.close)
    image.load()
    if _lacks_end(content, info.format):
        raise OSError(f"the end of the {info.format} is missing")
    return image, info


def open_image(content: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image file without decoding it. This is the only place that does: files of others come through it.

    Args:
        content: of the file.
        formats: names of Pillow; only these are tried.

    Raises:
        Exception: nearly any, if the file is damaged or has another format.
    """
    from PIL import Image

    return Image.open(io.BytesIO(content), formats=[name for name in formats if name in _readable()])


@functools.cache
def _readable() -> frozenset[str]:
    """Those of `FORMATS` that this Pillow has. The first call sets Pillow up."""
    from PIL import Image

    # It does not name the image; `inspect_image` does.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # The C library keeps freed blocks of up to 32 MB for the thread that had them: eight threads, eight times.
    Image.core.set_block_size(max(_BLOCK, Image.core.get_block_size()))
    Image.init()
    return frozenset(FORMATS) & Image.OPEN.keys()


class _Room:
    """Bounds what threads take at once."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Context that waits until `count` is free; more than all is all."""
        count = min(count, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


_ROOM = _Room(PIXELS_AT_ONCE)


def _lacks_end(content: bytes, kind: str) -> bool:
    """Return whether a file of a format whose decoder does not tell is without its end, as one that ends in zeros."""
    if kind == "QOI":
        return not content.endswith(_QOI_END)
    if kind not in ("JPEG", "MPO"):
        return False
    at = 2
    while (marker := _MARKER.search(content, at)) is not None:
        code, at = marker[1][0], marker.end()
        if code == 0xD9:  # end of image
            return False
        if code not in (0x01, 0xD8):  # the others have a length, and may hold a thumbnail with an end of its own
            at += int.from_bytes(content[at : at + 2], "big")
    return True


def _without_text(content: bytes) -> bytes:
    """The content of a PNG without its texts and color profile; anything else as it is."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, at = [content[:8]], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            parts.append(content[at:end])
        at = end
    return b"".join(parts)


def decode(
    content: bytes, side: int, channels: int, *, shrink: Resampling | None = None, framing: Framing = CROP
) -> np.ndarray:
    """Decode one image file: upright, made a square, resized.

    Args:
        content: of the file.
        side: of the result, px.
        channels: 1, 3 or 4.
        shrink: Pillow's filter for larger images; None: Lanczos.
        framing: how it becomes a square, and what is behind its transparent parts.

    Returns:
        uint8 [channels, side, side]; 4 channels are RGBA, the colors multiplied by alpha.
    """
    # A JPEG far larger than needed is decoded smaller; the filter does the last halving.
    with load_image(content, 2 * side, framing) as (image, _):
        _turn_upright(image)
        converted = convert(image, {1: "L", 3: "RGB", 4: "RGBa"}[channels], framing.background)
        pixels = np.array(framing.square(converted, side, shrink))
    if channels == 4:  # the filter overshoots in each channel by itself
        np.minimum(pixels[..., :3], pixels[..., 3:], out=pixels[..., :3])
    return channels_first(pixels)


def _turn_upright(image: Image.Image) -> None:
    """Rotate an image as its EXIF data say. A damaged EXIF block does not damage the pixels."""
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow's readers raise nearly any exception on damaged data
        if is_machine_fault(error):
            raise


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[h, w] or [h, w, C] to contiguous [C, h, w]."""
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def channels_last(pixels: np.ndarray) -> np.ndarray:
    """[1, h, w] to [h, w], and [C, h, w] to contiguous [h, w, C], as Pillow stores images."""
    return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def convert(image: Image.Image, mode: str, background: str = "white") -> Image.Image:
    """Convert any Pillow mode to L, RGB or RGBa.

    Transparent images are put on `background`; in RGBa, colors multiplied by alpha, they stay transparent.

    Samples of more than 8 bits are scaled by their type alone, never by the values of one image: 12 and 16 bits by
    their largest value, 32-bit integers as 16 bits, floats from 0 to 255.

    Raises:
        ValueError: an integer is negative or above 65,535.
    """
    from PIL import Image

    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # of a TIFF
    if image.mode == "I":
        least, most = image.getextrema()
        if not (least >= 0 and most <= 65535):  # type: ignore[operator]
            raise ValueError(f"its integers are {least} to {most}; 0 to 65,535 are read")
    width, height = image.size
    rows = max(1, _BAND // width)
    if rows >= height or (image.mode == mode and "transparency" not in image.info):
        return _convert(image, mode, background, bits)
    # In bands, because a conversion takes up to 20 bytes a pixel.
    out = Image.new(mode, image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        out.paste(_convert(band, mode, background, bits), (0, top))
    return out


def _convert(image: Image.Image, mode: str, background: str, bits: int) -> Image.Image:
    """See `convert`; `bits` of a sample in a TIFF."""
    from PIL import Image

    if image.mode[0] in "IF":  # I;16 and its variants, I, F: Pillow's own convert clips at 255
        values, clear = np.asarray(image, dtype=np.float32), image.info.get("transparency")
        white = 255 if image.mode == "F" else 2**bits - 1 if bits < 16 else 65535
        levels = np.rint(np.clip(np.nan_to_num(values) / white, 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(levels)
        if isinstance(clear, int):  # one value is transparent
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if mode != "RGBa":
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if mode == "RGBa":  # not every mode has a direct way
        image = image.convert("RGBA")
    if image.mode == "LAB" and mode == "L":  # Pillow converts it to RGB only
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of files in `FORMATS`, in lower case, without the dot."""
    from PIL import Image

    readable = {*_readable(), "MPO"}  # a JPEG with several images
    return frozenset(ending[1:] for ending, kind in Image.registered_extensions().items() if kind in readable)


def suffix(name: str) -> str:
    """Return the suffix of a name in lower case, without the dot."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def is_image_name(name: str) -> bool:
    """Return whether a name is that of an image; files with other names may be images too."""
    return suffix(name) in image_suffixes()


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
        return UNREAD
    # Without the path, which differs between copies of a set.
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or the name of its class."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
