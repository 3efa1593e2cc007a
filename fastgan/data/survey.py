"""What a sample of a source's images says of all: their sizes, gray or not, transparent or not, symmetric or not."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from fastgan.data.images import load_image, open_image
from fastgan.data.prepared.reader import PreparedSource
from fastgan.data.source_types import ArraySource, Encoded, Source

_LOOKED_AT = 256
_SIDE = 16
_SLIGHT = 0.03  # of the contrast: a smaller difference of the mean image and its mirror image is no handedness
_GRAY = 2  # levels by which the channels of a gray picture may differ, after JPEG


@dataclass(frozen=True)
class Survey:
    """See `fastgan.config.auto.Pictures` for the attributes."""

    count: int
    side: int | None
    channels: int
    gray: bool
    alpha: float
    aspect: float
    asymmetry: float
    num_classes: int


def survey(source: Source) -> Survey:
    """Look at up to 256 images, evenly spread over the source.

    Raises:
        ArgumentError: a file cannot be read.
    """
    count = len(source)
    chosen = [int(i) for i in np.linspace(0, count - 1, min(count, _LOOKED_AT)).round()]
    sizes, alpha = _sizes(source, chosen)
    side = min(_SIDE, source.resolution)
    small = np.stack([source.read(i, side) for i in chosen]).astype(np.float32)
    return Survey(
        count=count,
        side=round(statistics.median(min(size) for size in sizes)) if sizes else None,
        channels=source.channels,
        gray=source.channels == 3 and source.name == "folder" and bool(np.ptp(small, axis=1).max() <= _GRAY),
        alpha=alpha,
        aspect=statistics.median(max(size) / min(size) for size in sizes) if sizes else 1.0,
        asymmetry=asymmetry(small),
        num_classes=source.num_classes,
    )


def asymmetry(images: np.ndarray) -> float:
    """Mean over pixels of t^2, t = the mean of images minus their mirror images over its standard error; 1 by chance.

    Args:
        images: float [N, C, h, w].
    """
    if len(images) < 2:
        return 1.0
    half = images.shape[3] // 2
    difference = (images - images[..., ::-1])[..., :half].mean(axis=1)
    variance = difference.var(axis=0, ddof=1) / len(images)
    squares = difference.mean(axis=0) ** 2
    if squares.mean() <= (_SLIGHT * images.std()) ** 2:
        return 1.0
    # Pixels that hardly change, as a white border, say nothing.
    informative = variance > 1e-3 * max(float(variance.max()), 1e-12)
    return float((squares[informative] / variance[informative]).mean()) if informative.any() else 1.0


def _sizes(source: Source, chosen: list[int]) -> tuple[list[tuple[int, int]], float]:
    """(width, height) of images as they are stored, none if they have no size, and the share with transparent parts."""
    if isinstance(source, PreparedSource):
        return [(source.manifest.resolution, source.manifest.resolution)], 0.0
    if isinstance(source, ArraySource):
        height, width = source.images.shape[2:]
        return [(width, height)], 0.0
    files = source.encoded(source.resolution)
    if files is None:
        return [], 0.0
    looked = [_header(files, i) for i in chosen]
    return [size for size, _ in looked], sum(transparent for _, transparent in looked) / len(looked)


def _header(files: Encoded, index: int) -> tuple[tuple[int, int], bool]:
    content = files.read(index)
    with open_image(content) as image:
        size = image.size
        if not ("A" in image.mode or "a" in image.mode or "transparency" in image.info):
            return size, False
    with load_image(content) as (image, _):
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        return size, bool(alpha.min() < 255)
