"""What SRC of `fastgan prepare` may be: files in a folder or an archive, a published set, another prepared set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastgan.data.images import Checked, square
from fastgan.data.preparation.archives import Tar, Zip, image_suffixes, suffix, tar_files
from fastgan.data.preparation.originals import Folder, Item, Originals
from fastgan.data.prepared import Level, is_prepared, read_manifest
from fastgan.data.sources import ArraySource, celeba_files, open_source
from fastgan.data.walk import is_folder
from fastgan.errors import ArgumentError

_KINDS = (
    "must be a folder, zip, tar file or pattern of tar files, a CIFAR-10, MNIST or CelebA root, a prepared set, "
    "each alone or as folder:, zip:, tar:, cifar10:, mnist:, celeba: or prepared:PATH, or digits"
)


class Arrays(Originals):
    """A set that training holds in memory, each image at its own size: digits, CIFAR-10, MNIST, synthetic."""

    one_size, usual = True, 32

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._source: ArraySource | None = None
        source = self._open()
        self.kind, self.path = source.name, source.path
        self.channels, self.num_classes = source.channels, source.num_classes

    def items(self) -> Iterator[Item]:
        source = self._open()
        # Single images have no size or time to tell a change by: the fingerprint of all stands for each of them.
        stamp = int(source.fingerprint, 16)
        for index, label in enumerate(source.labels.tolist() if source.labels is not None else ()):
            yield Item(f"{self.kind} {index}", 0, stamp, (index,), label)

    def check(self, item: Item) -> Checked:
        height, width = self._open().images.shape[2:]
        return Checked("", "L" if self.channels == 1 else "RGB", (width, height))

    def pixels(self, item: Item, side: int, channels: int, fit: bool) -> np.ndarray:
        from PIL import Image
        from PIL.Image import Resampling

        planes = [Image.fromarray(plane) for plane in self._open().images[item.where[0]]]
        return np.stack([np.asarray(square(plane, side, Resampling.BOX, fit)) for plane in planes])

    def _open(self) -> ArraySource:
        if self._source is None:
            source = open_source(self._spec, 4)
            assert isinstance(source, ArraySource)
            self._source = source
        return self._source

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_source": None}  # read again in the other process instead of sent


class CelebA(Folder):
    """The aligned faces, in the order of the published list, without labels."""

    kind, channels, one_size, usual = "celeba", 3, True, 128

    def __init__(self, spec: str, root: Path) -> None:
        path, self._names = celeba_files(spec, root)
        super().__init__(path)

    def items(self) -> Iterator[Item]:
        for name in self._names:
            yield self.item(name)._replace(label=None)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_names": []}  # only the listing needs them


class Prepared(Originals):
    """Another prepared set: its own labels and names. Best made from the originals, as JPEG loses each time."""

    kind, one_size = "prepared", True

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._manifest = read_manifest(path, "SRC")
        self._level: Level | None = None
        self.channels, self.largest = None, self._manifest.resolution
        self.usual = self.largest
        self.num_classes, self.classes = self._manifest.num_classes, self._manifest.classes("SRC")

    def items(self) -> Iterator[Item]:
        stamp = int(self._manifest.fingerprint, 16)
        labels = self._manifest.labels("SRC")
        for index, name in enumerate(self._manifest.names("SRC")):
            yield Item(name, 0, stamp, (index,), None if labels is None else int(labels[index]))

    def check(self, item: Item) -> Checked:
        side = self._manifest.resolution
        return Checked("", "L" if self._manifest.channels == 1 else "RGB", (side, side))

    def pixels(self, item: Item, side: int, channels: int, fit: bool) -> np.ndarray:
        if self._level is None or self._level.resolution != side:
            self._level = Level(self._manifest, side, "SRC")
        pixels = self._level.pixels(item.where[0])
        if len(pixels) == channels:
            return pixels
        if channels == 3:
            return np.repeat(pixels, 3, axis=0)
        from PIL import Image

        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L"))[None]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_level": None}


def open_originals(src: str) -> Originals:
    """What SRC means: one of the kinds with a colon, a set that is installed or made up, or a path that is looked at.

    Raises: ArgumentError if there is nothing of the sort.
    """
    kind, colon, place = src.partition(":")
    if src in ("digits", "synthetic"):
        return Arrays(src)
    try:
        if not colon or kind not in _OPENERS:
            kind, place = _recognize(src), src
        if not place:
            raise ArgumentError("SRC", src, _KINDS)
        return _OPENERS[kind](place)
    except ArgumentError as error:
        raise error.renamed("SRC") from error
    except OSError as error:
        raise ArgumentError("SRC", src, f"it cannot be read ({error.filename or src}: {error.strerror})") from error


def _recognize(src: str) -> str:
    path = Path(src).expanduser()
    if is_prepared(path):
        return "prepared"
    if path.is_dir():
        roots = {
            "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py", "data_batch_1.bin"),
            "mnist": ("MNIST/raw", "train-images-idx3-ubyte"),
            "celeba": ("celeba/img_align_celeba",),
        }
        for kind, signs in roots.items():
            if any((path / sign).exists() for sign in signs):
                return kind
        return "tar" if _holds_tars_alone(path) else "folder"
    if path.is_file():
        with path.open("rb") as stream:
            start = stream.read(512)
        if start[:4] in (b"PK\3\4", b"PK\5\6") or path.suffix.lower() == ".zip":
            return "zip"
        if start[257:262] == b"ustar" or path.suffix.lower() in (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"):
            return "tar"
    elif any(sign in src for sign in "*?[{"):
        return "tar"
    found = f"{path} is missing; " if not path.exists() else ""
    raise ArgumentError("SRC", src, found + _KINDS)


def _holds_tars_alone(path: Path) -> bool:
    tars = 0
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and (is_folder(entry) or suffix(entry.name) in image_suffixes()):
                return False
            tars += entry.name.endswith(".tar")
    return tars > 0


def _existing(place: str, right: Callable[[Path], bool], what: str) -> Path:
    path = Path(place).expanduser()
    if not right(path):
        found = "is missing" if not path.exists() else "is a folder" if path.is_dir() else "is no folder"
        raise ArgumentError("SRC", place, f"{path} {found}; it may be {what}")
    return path


def _tar(place: str) -> Tar:
    files = tar_files(place)
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        what = f"{missing[0]} is missing" if missing else "nothing matches"
        raise ArgumentError("SRC", place, f"{what}; it may be a tar file, a folder of them, or a pattern")
    return Tar(Path(place).expanduser(), files)


_OPENERS: dict[str, Callable[[str], Originals]] = {
    "folder": lambda place: Folder(_existing(place, Path.is_dir, "a folder")),
    "zip": lambda place: Zip(_existing(place, Path.is_file, "a zip file")),
    "tar": _tar,
    "cifar10": lambda place: Arrays(f"cifar10:{place}"),
    "mnist": lambda place: Arrays(f"mnist:{place}"),
    "celeba": lambda place: CelebA(f"celeba:{place}", Path(place).expanduser()),
    "prepared": lambda place: Prepared(Path(place).expanduser()),
}
