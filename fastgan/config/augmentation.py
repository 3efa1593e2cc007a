"""Which augmentation a number of pictures calls for."""

from __future__ import annotations

from typing import Literal

FEW_PICTURES = 20_000


def augmentation_for(pictures: int) -> Literal["ada", "none"]:
    """ADA for fewer than 20,000 pictures, which a discriminator can learn by heart; none for more.

    Karras et al. 2020 (figure 1) see overfitting at 5,000 to 20,000 pictures of 256 px, and gains from ADA up to about
    30,000. An adaptive strength costs little where it is not needed: it stays near 0.
    """
    return "ada" if pictures < FEW_PICTURES else "none"
