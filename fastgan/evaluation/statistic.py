"""What is stored of a stream of images: either sums, or rows of single images. Ranks merge theirs."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor


class Sums:
    """Tensors that are added when two ranks merge.

    Attributes:
        FIELDS: name of each tensor in `state` -> its attribute.
    """

    FIELDS: ClassVar[dict[str, str]]

    def merge(self, other: Self) -> None:
        """Add the images of `other`."""
        for name in self.FIELDS.values():
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def state(self) -> dict[str, Tensor]:
        """Tensors for `load_state`."""
        return {key: torch.as_tensor(getattr(self, name)) for key, name in self.FIELDS.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, name in self.FIELDS.items():
            setattr(self, name, state[key].clone())


class IndexedRows:
    """Rows of one or several tensors, one row for each image with an index below `limit`.

    Attributes:
        KEY: name of a tensor in `state`, with {} for its number.
    """

    KEY: ClassVar[str]

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._indices: list[Tensor] = []
        self._tensors: list[list[Tensor]] = []

    def merge(self, other: Self) -> None:
        """Add the rows of `other`."""
        self._indices += other._indices
        self._tensors += other._tensors

    def tensors(self) -> list[Tensor]:
        """The tensors, with rows in the order of the images."""
        order = torch.cat(self._indices).argsort()
        return [torch.cat(parts)[order] for parts in zip(*self._tensors, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """Tensors for `load_state`."""
        if not self._indices:
            return {}
        self._indices = [torch.cat(self._indices)]
        self._tensors = [[torch.cat(parts) for parts in zip(*self._tensors, strict=True)]]
        return {"indices": self._indices[0], **{self.KEY.format(i): rows for i, rows in enumerate(self._tensors[0])}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self._indices = [state["indices"]]
            self._tensors = [[state[self.KEY.format(i)] for i in range(len(state) - 1)]]
