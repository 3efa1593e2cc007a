"""The settings of `fastgan prepare`."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastgan.data.source_types import is_resolution
from fastgan.errors import ArgumentError


@dataclass(frozen=True)
class Settings:
    """What is written for each image, and in which files.

    Attributes:
        resolution: Target resolution, px, a power of two; None: the largest up to 1024 that 95% of the images have.
        channels: 1 (gray) or 3 (color); None: 1 if all images are gray.
        cache_to: Resolutions up to this are stored as decoded arrays, those above as image files; 0: none as arrays.
        quality: JPEG quality, 1 to 100.
        lossless: Store PNG or lossless WebP instead of JPEG; --lossless without a value means png.
        fit: Keep the whole image, centered on black, instead of its center square.
        min_size: Skip images whose shorter side (with --fit: longer) has fewer pixels; None: the target; published
            sets: 1.
        per_shard: Images of SRC that share files: the unit of work, which a kill may cost.
    """

    resolution: int | None = None
    channels: int | None = None
    cache_to: int = 128
    quality: int = 95
    lossless: Literal["png", "webp"] | None = None
    fit: bool = False
    min_size: int | None = None
    per_shard: int = 1024

    def validate(self) -> None:
        """Raise ArgumentError for a value out of range."""
        if self.resolution is not None and not is_resolution(self.resolution):
            raise ArgumentError("--resolution", self.resolution, "must be a power of two from 4")
        if self.channels not in (None, 1, 3):
            raise ArgumentError("--channels", self.channels, "must be 1 or 3")
        if self.cache_to and not is_resolution(self.cache_to):
            raise ArgumentError("--cache-to", self.cache_to, "must be a power of two from 4, or 0 for none")
        if not 1 <= self.quality <= 100:
            raise ArgumentError("--quality", self.quality, "must be 1 to 100")
        if self.lossless not in (None, "png", "webp"):
            raise ArgumentError("--lossless", self.lossless, "must be png or webp")
        if self.min_size is not None and self.min_size < 1:
            raise ArgumentError("--min-size", self.min_size, "must be at least 1")
        if self.per_shard < 1:
            raise ArgumentError("--per-shard", self.per_shard, "must be at least 1")

    def flags(self) -> dict[str, Any]:
        """Return the settings by the names of their flags."""
        return {f"--{name.replace('_', '-')}": value for name, value in asdict(self).items()}


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that may change the bytes: of fastgan, and of Pillow with its encoders."""
    try:
        own = importlib.metadata.version("fastgan")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        own = "unknown"
    return {"fastgan": own, "pillow": importlib.metadata.version("pillow")}
