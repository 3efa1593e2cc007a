"""From SRC of `fastgan prepare` to an input collection: files, a published set, or another prepared set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastgan.data.images import ImageInfo, channels_first, channels_last, is_image_name
from fastgan.data.preparation.archives import TarCollection, ZipCollection, tar_files
from fastgan.data.preparation.collection import FolderCollection, InputCollection, InputImage, framing_of
from fastgan.data.prepared.manifest import read_manifest
from fastgan.data.prepared.reader import Level
from fastgan.data.registry import folder_kind, open_source
from fastgan.data.source_types import ArraySource
from fastgan.data.sources.published import celeba_files
from fastgan.data.walk import is_folder
from fastgan.errors import ArgumentError

_KINDS = (
    "must be a folder, zip, tar file or pattern of tar files, a CIFAR-10, MNIST, Fashion-MNIST or CelebA root, a "
    "prepared set, each alone or as folder:, zip:, tar:, cifar10:, mnist:, fashion-mnist:, celeba: or prepared:PATH, "
    "or digits or fashion-mnist"
)


class ArrayCollection(InputCollection):
    """A source in memory, each image at its own size: digits, CIFAR-10, MNIST, Fashion-MNIST, synthetic."""

    uniform_size, default_resolution = True, 32

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._source: ArraySource | None = None
        source = self._open()
        self.kind, self.path = source.name, source.path
        self.channels, self.num_classes = source.channels, source.num_classes
        self.classes = list(source.classes) or None

    def images(self) -> Iterator[InputImage]:
        source = self._open()
        # Single images have no size or time that shows a change: each has the fingerprint of all.
        stamp = int(source.fingerprint, 16)
        for index, label in enumerate(source.labels.tolist() if source.labels is not None else ()):
            yield InputImage(f"{self.kind} {index}", 0, stamp, (index,), label)

    def inspect(self, image: InputImage) -> ImageInfo:
        height, width = self._open().images.shape[2:]
        return ImageInfo("", "L" if self.channels == 1 else "RGB", (width, height))

    def pixels(self, image: InputImage, side: int, channels: int, fit: bool) -> np.ndarray:
        from PIL import Image
        from PIL.Image import Resampling

        planes = [Image.fromarray(plane) for plane in self._open().images[image.location[0]]]
        return np.stack([np.asarray(framing_of(fit).square(plane, side, Resampling.BOX)) for plane in planes])

    def _open(self) -> ArraySource:
        if self._source is None:
            source = open_source(self._spec, 4)
            assert isinstance(source, ArraySource)
            self._source = source
        return self._source

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_source": None}  # the other process reads it again


class CelebACollection(FolderCollection):
    """CelebA's aligned faces, in the order of the published list, without labels."""

    kind, channels, uniform_size, default_resolution = "celeba", 3, True, 128

    def __init__(self, spec: str, root: Path) -> None:
        path, self._names = celeba_files(spec, root)
        super().__init__(path)

    def images(self) -> Iterator[InputImage]:
        for name in self._names:
            yield self.image(name)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_names": []}  # needed for listing only


class PreparedCollection(InputCollection):
    """Another prepared set, with its labels and names. JPEG loses quality each time."""

    kind, uniform_size = "prepared", True

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._manifest = read_manifest(path, "SRC")
        self._level: Level | None = None
        self.channels = None
        self.default_resolution = self.max_resolution = self._manifest.resolution
        self.num_classes, self.classes = self._manifest.num_classes, self._manifest.classes("SRC")

    def images(self) -> Iterator[InputImage]:
        stamp = int(self._manifest.fingerprint, 16)
        labels = self._manifest.labels("SRC")
        for index, name in enumerate(self._manifest.names("SRC")):
            yield InputImage(name, 0, stamp, (index,), None if labels is None else int(labels[index]))

    def inspect(self, image: InputImage) -> ImageInfo:
        side = self._manifest.resolution
        return ImageInfo("", "L" if self._manifest.channels == 1 else "RGB", (side, side))

    def pixels(self, image: InputImage, side: int, channels: int, fit: bool) -> np.ndarray:
        if self._level is None or self._level.resolution != side:
            self._level = Level(self._manifest, side, "SRC")
        pixels = self._level.pixels(image.location[0])
        if len(pixels) == channels:
            return pixels
        if channels == 3:
            return np.repeat(pixels, 3, axis=0)
        from PIL import Image

        return channels_first(np.asarray(Image.fromarray(channels_last(pixels)).convert("L")))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_level": None}


def open_collection(src: str) -> InputCollection:
    """Open SRC: a kind with a colon, a built-in set, or a path whose kind is detected.

    Raises:
        ArgumentError: SRC is none of them.
    """
    kind, colon, place = src.partition(":")
    if src in ("digits", "synthetic") or src.partition("?")[0] == "fashion-mnist":
        return ArrayCollection(src)
    try:
        if not colon or kind not in _OPENERS:
            kind, place = _detect_kind(src), src
        if not place:
            raise ArgumentError("SRC", src, _KINDS)
        return _OPENERS[kind](place)
    except ArgumentError as error:
        raise error.renamed("SRC") from error
    except OSError as error:
        raise ArgumentError("SRC", src, f"it cannot be read ({error.filename or src}: {error.strerror})") from error


def _detect_kind(src: str) -> str:
    path = Path(src).expanduser()
    if path.is_dir():
        kind = folder_kind(path)
        return "tar" if kind == "folder" and _holds_only_tars(path) else kind
    if path.is_file():
        with path.open("rb") as stream:
            start = stream.read(512)
        if start[:4] in (b"PK\3\4", b"PK\5\6") or path.suffix.lower() == ".zip":
            return "zip"
        if start[257:262] == b"ustar" or path.suffix.lower() in (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"):
            return "tar"
    elif any(sign in src for sign in "*?[{"):
        return "tar"
    raise ArgumentError("SRC", src, _KINDS if path.exists() or ":" in src else "it is missing")


def _holds_only_tars(path: Path) -> bool:
    tars = 0
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and (is_folder(entry, "SRC") or is_image_name(entry.name)):
                return False
            tars += entry.name.endswith(".tar")
    return tars > 0


def _existing(place: str, accepts: Callable[[Path], bool], what: str) -> Path:
    path = Path(place).expanduser()
    if not accepts(path):
        why = "is missing" if not path.exists() else "is a folder" if path.is_dir() else "is not a folder"
        raise ArgumentError("SRC", place, f"must be {what}; {path} {why}")
    return path


def _open_tars(place: str) -> TarCollection:
    files = tar_files(place)
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        why = f"{missing[0]} is missing" if missing else "nothing matches"
        raise ArgumentError("SRC", place, f"must be a tar file, a folder of tar files, or a pattern; {why}")
    return TarCollection(Path(place).expanduser(), files)


_OPENERS: dict[str, Callable[[str], InputCollection]] = {
    "folder": lambda place: FolderCollection(_existing(place, Path.is_dir, "a folder")),
    "zip": lambda place: ZipCollection(_existing(place, Path.is_file, "a zip file")),
    "tar": _open_tars,
    "cifar10": lambda place: ArrayCollection(f"cifar10:{place}"),
    "mnist": lambda place: ArrayCollection(f"mnist:{place}"),
    "fashion-mnist": lambda place: ArrayCollection(f"fashion-mnist:{place}"),
    "celeba": lambda place: CelebACollection(f"celeba:{place}", Path(place).expanduser()),
    "prepared": lambda place: PreparedCollection(Path(place).expanduser()),
}
