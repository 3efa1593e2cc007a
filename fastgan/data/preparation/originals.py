"""Image files as users keep them, listed one by one so that millions need no more memory than a few.

A folder here, archives in archives.py. The order is that of the names; training from the folder itself has the same.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastgan.data import images
from fastgan.data.images import Checked
from fastgan.data.walk import walk
from fastgan.errors import ArgumentError

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """One original.

    name: unique, "/" between parts. size, stamp: bytes, and what changes with the content as far as that is cheap
    to tell (time of change, checksum); both for noticing a change. where: what its reader needs to find it. label:
    a number, the name of a class, or None. reason: why it is no image, if the listing alone tells.
    """

    name: str
    size: int = 0
    stamp: int = 0
    where: tuple[int, ...] = ()
    label: int | str | None = None
    reason: str = ""


class Originals(ABC):
    """What `fastgan prepare` reads: items in a fixed order, each of which gives pixels.

    kind: as in SRC. path: where they lie, or None. channels: 1 or 3, if there is no choice. one_size: whether all
    images have one size, so that none is too small beside the others. usual: the resolution that such a set is
    used at, px; largest: the highest that it has, if it cannot be enlarged. lasting_stamps: whether
    the stamps of items are those of a copy, too. num_classes, classes: if known beforehand. All of it can be sent to
    another process.
    """

    kind: str
    path: Path | None = None
    channels: int | None = None
    one_size: bool = False
    usual: int | None = None
    largest: int | None = None
    lasting_stamps: bool = True
    num_classes: int | None = None
    classes: list[str] | None = None

    @property
    def name(self) -> str:
        """Without the folders above, so that a copy elsewhere is called the same."""
        return self.kind if self.path is None else self.path.resolve().name

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """All of them, in the order of the set.

        Raises: ArgumentError naming the file, if the whole is not what it should be.
        """

    def identity(self, item: Item) -> bytes:
        """What makes an original another one, wherever the set lies; unlike the time of a file."""
        stamp = item.stamp if self.lasting_stamps else 0
        return f"{item.name}\0{item.size}\0{stamp}\0{item.label}\n".encode(errors="surrogateescape")

    @abstractmethod
    def check(self, item: Item) -> Checked:
        """Look at one, decoding it only where nothing else tells whether it is whole."""

    @abstractmethod
    def pixels(self, item: Item, side: int, channels: int, fit: bool) -> np.ndarray:
        """One image: uint8 [channels, side, side]. Raises nearly anything on a damaged file."""


class Files(Originals):
    """Originals that are image files, wherever they lie."""

    @abstractmethod
    def open(self, item: Item) -> BinaryIO: ...

    def check(self, item: Item) -> Checked:
        found = images.check(lambda: self.open(item), item.name)
        if found.reason:
            try:
                with self.open(item) as stream:
                    stream.read(1)
            except OSError as error:
                if not isinstance(error, PermissionError):
                    raise gone(item, error) from error
            except Exception:  # it is there, and damaged
                logger.debug("%s is skipped", item.name, exc_info=True)
        return found

    def pixels(self, item: Item, side: int, channels: int, fit: bool) -> np.ndarray:
        from PIL.Image import Resampling

        with self.open(item) as stream:
            return images.decode(stream, side, channels, shrink=Resampling.BOX, fit=fit)


def gone(item: Item, error: OSError) -> ArgumentError:
    """Not a damaged file, but a disk or network that failed: skipping would drop all that comes after."""
    may_be = f"it was there before and cannot be read now ({error.strerror}); the same command goes on"
    return ArgumentError("SRC", item.name, may_be)


class Folder(Files):
    """Every file below a folder but hidden ones; a label is the name of the first-level subfolder."""

    kind, lasting_stamps = "folder", False

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def items(self) -> Iterator[Item]:
        for name, reason in walk(self.path):
            yield Item(name, reason=reason) if reason else self.item(name)

    def item(self, name: str) -> Item:
        try:
            found = (self.path / name).stat()
        except OSError as error:
            return Item(name, reason=error.strerror or str(error))
        return Item(name, found.st_size, found.st_mtime_ns, label=first_folder(name))

    def check(self, item: Item) -> Checked:
        file = self.path / item.name
        if file.exists() and not file.is_file():  # opening a named pipe would wait forever
            return Checked("no file")
        return super().check(item)

    def open(self, item: Item) -> BinaryIO:
        return (self.path / item.name).open("rb")


def first_folder(name: str) -> str | None:
    folder, slash, _ = name.partition("/")
    return folder if slash else None


def hidden(name: str) -> bool:
    """Files such as .DS_Store, and the resource forks that macOS puts into zips."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def printable(text: str) -> str:
    """One line of valid UTF-8: names of files may have any character in them, and none that is valid."""
    shown = text.encode(errors="backslashreplace").decode()
    return "".join(f"\\x{ord(c):02x}" if ord(c) < 32 else c for c in shown)
