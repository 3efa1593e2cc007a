"""The interface of input collections, and the collections of image files in a folder.

Images are listed one by one, sorted by name, which is also the order of training from the folder itself.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastgan.data.folder_labels import DATASET_JSON, MAX_BYTES, is_storage, label_of, parse_dataset_json
from fastgan.data.framing import CROP, Framing
from fastgan.data.images import ImageInfo, decode, inspect_image
from fastgan.data.walk import walk
from fastgan.errors import ArgumentError

logger = logging.getLogger(__name__)


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
        """Open one image. It is decoded only if nothing cheaper shows whether it is complete."""

    @abstractmethod
    def pixels(self, image: InputImage, side: int, channels: int, fit: bool) -> np.ndarray:
        """Return one image: uint8 [channels, side, side]. Raises nearly any exception on a damaged file."""


class FileCollection(InputCollection):
    """A collection of image files, in a folder or an archive."""

    @abstractmethod
    def open(self, image: InputImage) -> BinaryIO:
        """Open the file of an image."""

    def inspect(self, image: InputImage) -> ImageInfo:
        info = inspect_image(lambda: self.open(image), image.name)
        if info.problem:
            try:
                with self.open(image) as stream:
                    stream.read(1)
            except OSError as error:
                if not isinstance(error, PermissionError):
                    raise unreadable(image, error) from error
            except Exception:  # it is there, and damaged
                logger.debug("%s is skipped", image.name, exc_info=True)
        return info

    def pixels(self, image: InputImage, side: int, channels: int, fit: bool) -> np.ndarray:
        from PIL.Image import Resampling

        with self.open(image) as stream:
            return decode(stream, side, channels, shrink=Resampling.BOX, framing=framing_of(fit))


def unreadable(image: InputImage, error: OSError) -> ArgumentError:
    """The error for a disk or network that failed: skipping the image would skip all that follow, too."""
    problem = f"it was listed and cannot be read now ({error.strerror}); run the same command again to continue"
    return ArgumentError("SRC", image.name, problem)


class FolderCollection(FileCollection):
    """Every file below a folder that is not hidden; labels are as in `folder_labels`."""

    kind, stable_stamps = "folder", False

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def images(self) -> Iterator[InputImage]:
        table = self.path / DATASET_JSON
        stored, storage = None, table.is_file()
        if storage:
            with table.open("rb") as stream:
                stored = parse_dataset_json(stream.read(MAX_BYTES), "SRC", str(table))
        else:
            storage = is_storage(name for name, problem in walk(self.path) if not problem)
        for name, problem in walk(self.path):
            if problem:
                yield InputImage(name, problem=problem)
            elif name != DATASET_JSON:
                yield self.image(name)._replace(label=label_of(name, stored, storage))

    def image(self, name: str) -> InputImage:
        """Return the entry of one file, without its label."""
        try:
            status = (self.path / name).stat()
        except OSError as error:
            return InputImage(name, problem=error.strerror or str(error))
        return InputImage(name, status.st_size, status.st_mtime_ns)

    def inspect(self, image: InputImage) -> ImageInfo:
        file = self.path / image.name
        if file.exists() and not file.is_file():  # opening a named pipe would block forever
            return ImageInfo("not a regular file")
        return super().inspect(image)

    def open(self, image: InputImage) -> BinaryIO:
        return (self.path / image.name).open("rb")


def framing_of(fit: bool) -> Framing:
    """Return how `fastgan prepare` frames images, with and without --fit."""
    return Framing("pad", "black") if fit else CROP


def first_folder(name: str) -> str | None:
    """Return the first folder of a name, or None for a file without a folder."""
    folder, slash, _ = name.partition("/")
    return folder if slash else None


def is_hidden(name: str) -> bool:
    """Return whether a name has a part such as .DS_Store, `..` or __MACOSX (resource forks in zips)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def printable(text: str) -> str:
    """Return one line of valid UTF-8; names of files may have any characters, also invalid ones."""
    shown = text.encode(errors="backslashreplace").decode()
    return "".join(f"\\x{ord(c):02x}" if ord(c) < 32 else c for c in shown)
