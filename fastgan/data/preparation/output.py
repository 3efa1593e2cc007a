"""What a preparation writes: chosen from the settings and the inspections of all images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fastgan.data.preparation.collection import InputImage
from fastgan.data.preparation.context import Context
from fastgan.data.preparation.state import Inspection
from fastgan.errors import printable


@dataclass(frozen=True)
class OutputFormat:
    """What is written for each image.

    Attributes:
        resolutions: from 4 to the target, px.
        cached: those of them that are stored as arrays.
        channels: 1 or 3.
        encoding: of the image files: jpeg, png or webp.
        quality: of JPEG.
        fit: keep the whole image, centered on black.
        min_size: smallest accepted shorter side (with `fit`: longer side), px.
        num_classes: 0 without labels.
        ranks: label of each class that has a name.
    """

    resolutions: tuple[int, ...]
    cached: tuple[int, ...]
    channels: int
    encoding: str
    quality: int = 95
    fit: bool = False
    min_size: int = 1
    num_classes: int = 0
    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def encoded(self) -> tuple[int, ...]:
        """The resolutions that are stored as image files."""
        return self.resolutions[len(self.cached) :]

    def label(self, image: InputImage) -> int | None:
        """Return the label of an image as it is stored."""
        if not self.num_classes or image.label is None:
            return None
        return self.ranks[image.label] if isinstance(image.label, str) else image.label

    def rejections(self, inspections: list[Inspection]) -> dict[int, str]:
        """Return place in the shard -> problem of the images that are not used."""
        out = {}
        for at, one in enumerate(inspections):
            if one.problem:
                out[at] = one.problem
            elif _extent(one, self.fit) < self.min_size:
                out[at] = f"too small: {one.width} x {one.height}, smaller than {self.min_size} px"
        return out


def choose_output(context: Context, shards: int) -> OutputFormat:
    """Choose what to write.

    Raises:
        ArgumentError: no image is usable.
    """
    settings, collection, state = context.settings, context.collection, context.state
    reach: Counter[int] = Counter()  # largest power of two that an image reaches -> number of images
    gray, classes, highest, first_problem = True, set(), -1, ""
    kinds: dict[type, str] = {}  # of labels -> the first image with one
    for shard in range(shards):
        for image, one in zip(state.images(shard), state.inspections(shard), strict=True):
            if one.problem:
                first_problem = first_problem or f"{printable(image.name)}: {printable(one.problem)}"
                continue
            reach[1 << max(_extent(one, settings.fit).bit_length() - 1, 0)] += 1
            gray &= one.gray
            kinds.setdefault(type(image.label), printable(image.name))
            if isinstance(image.label, str):
                classes.add(image.label)
            elif image.label is not None:
                highest = max(highest, image.label)
    if not reach:
        raise context.unusable(f"none of its files is an image (first: {first_problem})")
    if len(kinds) > 1:
        context.report(_why_no_labels(kinds))
    elif len(classes) == 1:
        context.report(f"1 class: every image has the label {printable(*classes)}")
    resolution = settings.resolution or collection.default_resolution or _common_resolution(reach)
    resolutions = tuple(2**i for i in range(2, resolution.bit_length()))
    return OutputFormat(
        resolutions=resolutions,
        cached=tuple(r for r in resolutions if r <= settings.cache_to),
        channels=settings.channels or collection.channels or (1 if gray else 3),
        encoding=settings.lossless or "jpeg",
        quality=settings.quality,
        fit=settings.fit,
        min_size=settings.min_size or (1 if collection.uniform_size else resolution),
        num_classes=0 if len(kinds) > 1 else collection.num_classes or len(classes) or highest + 1,
        ranks={name: rank for rank, name in enumerate(sorted(classes))} if len(kinds) == 1 else {},
    )


def _why_no_labels(kinds: dict[type, str]) -> str:
    """Why a collection with several kinds of labels has none; `kinds`: kind -> its first image."""
    number, word = kinds.get(int), kinds.get(str)
    if number and word:
        return f"no labels: that of {number} is a number, and that of {word} a name; use one of them"
    labeled, remedy = number or word, "move it into the subfolder of its class, or give it a label"
    return f"no labels: {labeled} has one, and {kinds[type(None)]} has none; {remedy}"


def _extent(one: Inspection, fit: bool) -> int:
    """The side that must reach the target resolution."""
    return max(one.width, one.height) if fit else min(one.width, one.height)


def _common_resolution(reach: Counter[int]) -> int:
    """The largest power of two up to 1024 that 95% of the images have."""
    total = sum(reach.values())
    for resolution in (1024, 512, 256, 128, 64, 32, 16, 8):
        if 20 * sum(count for power, count in reach.items() if power >= resolution) >= 19 * total:
            return resolution
    return 4
