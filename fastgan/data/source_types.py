"""The interface of image sources, and the two base classes that sources share: arrays in memory, and image files."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgan.data.faults import raise_if_machine
from fastgan.data.framing import CROP, Framing
from fastgan.data.images import area_average, decode, decode_problem, first_line, read_whole
from fastgan.errors import ArgumentError, printable

MAX_CLASSES = 2**20
"""Most classes of a source: a network has a vector for each."""
_MOST_NAMED = 10  # of files that are skipped


class Encoded(NamedTuple):
    """The image files of a source, for decoders other than Pillow.

    Attributes:
        read: bytes of the file of one image, by index. Thread-safe.
        name: name of that file in error messages.
        side: the center square of an image is resized to side x side, and area-averaged from there.
        kinds: (format, mode, transparent) as in `images.ImageInfo` -> name of one file of that kind.
        exact: every image is side x side already.
    """

    read: Callable[[int], bytes]
    name: Callable[[int], str]
    side: int
    kinds: dict[tuple[str, str, bool], str]
    exact: bool = False


@dataclass(eq=False, repr=False)
class Source(ABC):
    """A fixed set of images, each readable at every power of two from 4 px to the target resolution. Thread-safe.

    Attributes:
        name: kind of source, as in `--data`.
        path: its folder, or None.
        channels: channels of every image.
        resolution: the target, px.
        labels: int64 [N], or None.
        num_classes: 0 without labels.
        classes: names of the classes by label, or empty.
        fingerprint: 16 hex digits that change with the data and not with the folder it is in.
        skipped: (file, reason) of files that are not usable images.
        notes: what else a user should know of the images, a line each.
    """

    name: str
    _: KW_ONLY
    resolution: int
    channels: int
    labels: np.ndarray | None
    num_classes: int
    fingerprint: str
    path: Path | None = None
    skipped: Sequence[tuple[str, str]] = ()
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    def remarks(self) -> list[str]:
        """Return lines for a user: the first of the files that are skipped, their number, and the notes."""
        lines = [f"skipped {file}: {reason}" for file, reason in self.skipped[:_MOST_NAMED]]
        if self.skipped:
            what = "file or folder" if len(self.skipped) == 1 else "files or folders"
            lines.append(f"skipped {len(self.skipped):,} {what}; {len(self):,} images remain")
        return [printable(line) for line in (*lines, *self.notes)]

    @abstractmethod
    def _target(self, index: int) -> np.ndarray:
        """One image at the target resolution: uint8 [C, resolution, resolution]."""

    def read(self, index: int, resolution: int) -> np.ndarray:
        """Return one image, area-averaged from the target resolution: uint8 [C, resolution, resolution].

        Raises:
            ArgumentError: `resolution` is not a power of two from 4 to the target, or the file cannot be decoded.
            IndexError: `index` is outside [0, N).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        self.require_resolution(resolution)
        return self._read(index, resolution)

    def _read(self, index: int, resolution: int) -> np.ndarray:
        return area_average(self._target(index), resolution)

    def arrays(self, resolution: int) -> list[np.ndarray] | None:
        """Return the memory-mapped arrays of a resolution that is stored decoded: uint8 [n, C, r, r] each, in order.

        Returns:
            None if the resolution is not stored decoded.

        Raises:
            ArgumentError: a file has other contents than it should; the message names it.
        """
        return None

    def encoded(self, resolution: int) -> Encoded | None:
        """Return the image files from which images of `resolution` are made, or None without such files."""
        return None

    def require_resolution(self, resolution: int) -> None:
        """Raise ArgumentError if images cannot be read at `resolution`."""
        if not is_resolution(resolution) or resolution > self.resolution:
            raise ArgumentError("--resolution", resolution, f"must be a power of two from 4 to {self.resolution}")


class ArraySource(Source):
    """Images in memory at their own size, resized when they are read.

    Args:
        name: kind of source.
        images: uint8 [N, C, h, w].
        labels: int64 [N], from 0 to 9.
        resolution: the target, px.
        path: the folder the images were read from, or None.
        classes: names of the classes, or empty.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        resolution: int,
        path: Path | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        digest = hashlib.sha256(f"{name} {images.shape} ".encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(np.ascontiguousarray(labels).data)
        super().__init__(
            name,
            resolution=resolution,
            channels=images.shape[1],
            labels=labels,
            num_classes=10,
            fingerprint=digest.hexdigest()[:16],
            path=path,
            classes=classes,
        )
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def _target(self, index: int) -> np.ndarray:
        from PIL import Image

        planes = (Image.fromarray(plane) for plane in self.images[index])
        return np.stack([np.asarray(CROP.square(plane, self.resolution)) for plane in planes])


class FileSource(Source):
    """One image file per image, decoded when it is read.

    Args:
        name: kind of source.
        path: the folder that `files` are relative to.
        files: in the order of the images.
        kinds: see `Encoded`; None: all files are RGB JPEGs.
        checksums: file -> a checksum of part of its content, if every file was opened.
        framing: how images become squares.
        attributes: other attributes of `Source`. Images are converted to `channels`: 1, 3 or 4.
    """

    path: Path

    def __init__(
        self,
        name: str,
        path: Path,
        files: list[str],
        kinds: dict[tuple[str, str, bool], str] | None = None,
        checksums: dict[str, int] | None = None,
        framing: Framing = CROP,
        **attributes: Any,
    ) -> None:
        framed = "" if framing == CROP else f" {framing}"
        digest = hashlib.sha256(f"{name} {len(files)}{framed}".encode())
        for file in files:
            checksum = "" if checksums is None else f" {checksums[file]}"
            digest.update(f"\0{file}\0{(path / file).stat().st_size}{checksum}".encode(errors="surrogateescape"))
        super().__init__(name, path=path, fingerprint=digest.hexdigest()[:16], **attributes)
        self._files, self._framing = files, framing
        self._kinds = {("JPEG", "RGB", False): files[0]} if kinds is None else kinds

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, resolution: int) -> Encoded | None:
        if self._framing.fit != "crop":
            return None

        def name(index: int) -> str:
            return str(self._file(index))

        return Encoded(lambda index: self._file(index).read_bytes(), name, self.resolution, self._kinds)

    def _file(self, index: int) -> Path:
        return self.path / self._files[index]

    def _target(self, index: int) -> np.ndarray:
        file = self._file(index)
        try:
            with file.open("rb") as stream:
                return decode(read_whole(stream), self.resolution, self.channels, framing=self._framing)
        except Exception as error:  # Pillow's decoders raise nearly any exception on a damaged file
            raise_if_machine(error, "--data", str(file))
            problem = f"the image cannot be decoded ({decode_problem(error)}); remove or replace the file"
            raise ArgumentError("--data", str(file), problem) from error


def is_resolution(resolution: int) -> bool:
    """Return whether a source could have this resolution: a power of two from 4."""
    return resolution >= 4 and resolution & (resolution - 1) == 0


def require_channels(name: str, channels: int, requested: int | None) -> None:
    """Raise ArgumentError unless `requested` is None or the `channels` that the source `name` has."""
    if requested not in (None, channels):
        plural = "" if channels == 1 else "s"
        raise ArgumentError("--channels", requested, f"must be {channels}; {name} has {channels} channel{plural}")


def import_for(spec: str, module: str, package: str) -> Any:
    """Import a module that the source `spec` needs.

    Raises:
        ArgumentError: it cannot be imported. A torchvision built for another torch raises more than ImportError.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        problem = f"it needs {package}, which cannot be imported ({first_line(error)}); pip install {package}"
        raise ArgumentError("--data", spec, problem) from error
