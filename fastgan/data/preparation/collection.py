"""The interface of input collections, and the collections of image files in a folder.

Images are listed one by one, sorted by name, which is also the order of training from the folder itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastgan.data.faults import regular_status
from fastgan.data.folder_labels import DATASET_JSON, label_of, layout, read_dataset_json
from fastgan.data.framing import CROP, Framing
from fastgan.data.images import ImageInfo, decode, inspect_image, read_whole
from fastgan.data.walk import walk


class InputImage(NamedTuple):
    """One image of an input collection, as it is listed.

    Attributes:
        name: unique, with "/" between parts.
        size: bytes; 0 if it is not a file.
        stamp: modification time or checksum; with `size`, shows whether the image has changed.
        location: where its collection finds it.
        label: a number, the name of a class, or None.
        problem: why it is not a usable image, if the listing shows that; otherwise "".
    """

    name: str
    size: int = 0
    stamp: int = 0
    location: tuple[int, ...] = ()
    label: int | str | None = None
    problem: str = ""


class InputCollection(ABC):
    """Images in a fixed order, as `fastgan prepare` reads them. Can be sent to another process.

    Attributes:
        kind: as in SRC.
        path: its folder or file, or None.
        channels: 1 or 3 if all images have as many; None: it depends on the images.
        uniform_size: all images have one size, so that none is rejected as too small.
        default_resolution: px; None: it depends on the images.
        max_resolution: px, if images cannot be enlarged.
        stable_stamps: copies of an image have the same stamp.
        num_classes: number of classes, if it is known before the images are listed.
        classes: their names, if they have names that are known before.
    """

    kind: str
    path: Path | None = None
    channels: int | None = None
    uniform_size: bool = False
    default_resolution: int | None = None
    max_resolution: int | None = None
    stable_stamps: bool = True
    num_classes: int | None = None
    classes: list[str] | None = None

    @property
    def name(self) -> str:
        """Name without parent folders, so that a copy elsewhere has the same name."""
        return self.kind if self.path is None else self.path.resolve().name

    @property
    def title(self) -> str:
        """Kind and name, for messages and records."""
        return f"{self.kind} {self.name}"

    @abstractmethod
    def images(self) -> Iterator[InputImage]:
        """Yield all images in order.

        Raises:
            ArgumentError: the collection is damaged; the message names the file.
        """

    def identity(self, image: InputImage) -> bytes:
        """Return bytes that change with the image, but not with its place or its modification time."""
        stamp = image.stamp if self.stable_stamps else 0
        return f"{image.name}\0{image.size}\0{stamp}\0{image.label}\n".encode(errors="surrogateescape")

    @abstractmethod
    def inspect(self, image: InputImage) -> ImageInfo:
        """Open one image, and decode it to see whether it is whole."""

    @abstractmethod
    def pixels(self, image: InputImage, side: int, channels: int, fit: bool) -> np.ndarray:
        """Return one image: uint8 [channels, side, side]. Raises nearly any exception on a damaged file."""


class FileCollection(InputCollection):
    """A collection of image files, in a folder or an archive."""

    @abstractmethod
    def open(self, image: InputImage) -> BinaryIO:
        """Open the file of an image."""

    def inspect(self, image: InputImage) -> ImageInfo:
        return inspect_image(lambda: self.open(image), image.name, "SRC")

    def pixels(self, image: InputImage, side: int, channels: int, fit: bool) -> np.ndarray:
        from PIL.Image import Resampling

        with self.open(image) as stream:
            return decode(read_whole(stream), side, channels, shrink=Resampling.BOX, framing=framing_of(fit))


class FolderCollection(FileCollection):
    """Every file below a folder that is not hidden; labels are as in `folder_labels`."""

    kind, stable_stamps = "folder", False

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def images(self) -> Iterator[InputImage]:
        storage, stored = read_dataset_json(self.path, "SRC")
        if not storage:
            _, storage = layout(name for name, problem in walk(self.path, flag="SRC") if not problem)
        for name, problem in walk(self.path, flag="SRC"):
            if problem:
                yield InputImage(name, problem=problem)
            elif name != DATASET_JSON:
                yield self.image(name)._replace(label=label_of(name, stored, storage))

    def image(self, name: str) -> InputImage:
        """Return the entry of one file, without its label."""
        status, problem = regular_status(self.path / name, "SRC", name)
        if status is None:
            return InputImage(name, problem=problem)
        return InputImage(name, status.st_size, status.st_mtime_ns)

    def inspect(self, image: InputImage) -> ImageInfo:
        _, problem = regular_status(self.path / image.name, "SRC", image.name)  # it may be listed hours before
        return ImageInfo(problem) if problem else super().inspect(image)

    def open(self, image: InputImage) -> BinaryIO:
        return (self.path / image.name).open("rb")


def framing_of(fit: bool) -> Framing:
    """Return how `fastgan prepare` frames images, with and without --fit."""
    return Framing("pad", "black") if fit else CROP


def unpacked_name(name: str) -> str:
    """Return the name below the current folder that a file of an archive gets when it is unpacked.

    Some programs on Windows write names with backslashes; others begin every name with "./" or "/".
    """
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def is_hidden(name: str) -> bool:
    """Return whether a name has a part such as .DS_Store, `..` or __MACOSX (resource forks in zips)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
