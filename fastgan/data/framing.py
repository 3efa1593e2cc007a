"""How an image of any shape becomes a square: crop, pad or stretch, and what is behind its transparent parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Resampling

Fit = Literal["crop", "pad", "stretch"]


@dataclass(frozen=True)
class Framing:
    """How images of a source are framed.

    Attributes:
        fit: crop to the center square, pad to a square, or stretch to one.
        background: color of the padding and behind transparent parts, as Pillow names colors; not used with 4
            channels, whose padding is transparent.
    """

    fit: Fit = "crop"
    background: str = "white"

    def validate(self) -> None:
        """Raise ArgumentError for a value that cannot be used."""
        if self.fit not in get_args(Fit):
            raise ArgumentError("--fit", self.fit, "must be crop, pad or stretch")
        self.color("RGB")

    def color(self, mode: str) -> tuple[int, ...] | int:
        """The background in a mode of Pillow; transparent in one with alpha.

        Raises:
            ArgumentError: it is no color.
        """
        from PIL import ImageColor

        if mode == "RGBa":
            return (0, 0, 0, 0)
        try:
            color = ImageColor.getcolor(self.background, mode)
        except ValueError:
            problem = "must be a color such as white, gray, '#00ff80' or 'rgb(0, 255, 128)'"
            raise ArgumentError("--background", self.background, problem) from None
        return color if isinstance(color, int) else color[:3]

    def extent(self, size: tuple[int, int]) -> int:
        """The side of an image that becomes that of the square, px: the shorter one; if padded, the longer one."""
        return max(size) if self.fit == "pad" else min(size)

    def square(self, image: Image.Image, side: int, shrink: Resampling | None = None) -> Image.Image:
        """Resize to `side` x `side`. Pillow's filters widen when shrinking, so nothing aliases.

        Args:
            image: in mode L, RGB or RGBa.
            side: px.
            shrink: filter for larger images; None: Lanczos.
        """
        from PIL import Image
        from PIL.Image import Resampling

        width, height = image.size
        extent = self.extent(image.size)
        # Enlarged with Lanczos, strokes ring visibly; with bicubic hardly.
        smooth = (Resampling.LANCZOS if shrink is None else shrink) if extent > side else Resampling.BICUBIC
        if self.fit == "stretch" and width != height:
            return image.resize((side, side), smooth)
        if self.fit == "pad" and width != height:
            inner = max(1, round(width * side / extent)), max(1, round(height * side / extent))
            whole = image if inner == image.size else image.resize(inner, smooth)
            image = Image.new(image.mode, (side, side), self.color(image.mode))
            image.paste(whole, ((side - inner[0]) // 2, (side - inner[1]) // 2))
            return image
        left, top = (width - extent) // 2, (height - extent) // 2
        if extent == side:
            return image.crop((left, top, left + side, top + side))
        return image.resize((side, side), smooth, box=(left, top, left + extent, top + extent))


CROP = Framing()
