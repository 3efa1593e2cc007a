"""MNIST, and Fashion-MNIST in the same layout: two idx files for each split, unpacked or .gz, in one folder."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from fastgan.data.faults import exists, raise_if_machine
from fastgan.data.source_types import ArraySource, Source, require_channels
from fastgan.errors import ArgumentError

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
PREFIXES = {"train": "train", "test": "t10k"}
_INNER = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
_LARGEST = 2**28  # bytes of a file, unpacked: five times MNIST's images
_PIECE = 2**20  # bytes


def open_mnist(spec: str, root: Path, resolution: int, channels: int | None, split: str = "train") -> Source:
    """MNIST: 60,000 training or 10,000 test images of 28 px."""
    return _open("mnist", spec, root, resolution, channels, split)


def open_fashion_mnist(
    spec: str, root: Path | None, resolution: int, channels: int | None, split: str = "train"
) -> Source:
    """Fashion-MNIST (Xiao 2017), with the names of its classes; without a root, from Debian's package."""
    if root is None and not DEBIAN_FASHION.is_dir():
        problem = (
            "it needs Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist), or "
            "fashion-mnist:FOLDER with the four .gz files of the set"
        )
        raise ArgumentError("--data", spec, problem)
    return _open("fashion-mnist", spec, root or DEBIAN_FASHION, resolution, channels, split)


def is_idx_folder(path: Path) -> bool:
    """Return whether a folder holds the images of a split."""
    return any(exists(path / name, "--data") for prefix in PREFIXES.values() for name in _names(prefix, "images", 3))


def _open(kind: str, spec: str, root: Path, resolution: int, channels: int | None, split: str) -> Source:
    require_channels(kind, 1, channels)
    path = root / _INNER[kind] if (root / _INNER[kind]).is_dir() else root
    images = _read(spec, path, PREFIXES[split], "images", 3)
    labels = _read(spec, path, PREFIXES[split], "labels", 1)
    if not len(images) or len(images) != len(labels) or labels.max() > 9:
        problem = f"{path} must hold as many labels, from 0 to 9, as images; it has {len(images)} images and "
        raise ArgumentError("--data", spec, f"{problem}{len(labels)} labels")
    classes = FASHION_CLASSES if kind == "fashion-mnist" else ()
    return ArraySource(kind, images[:, None], labels.astype(np.int64), resolution, path, classes)


def _names(prefix: str, what: str, dimensions: int) -> list[str]:
    """The names that a file has: as published, as unpacked by some tools, and both compressed."""
    plain = [f"{prefix}-{what}{mark}idx{dimensions}-ubyte" for mark in "-."]
    return [*plain, *(f"{name}.gz" for name in plain)]


def _read(spec: str, path: Path, prefix: str, what: str, dimensions: int) -> np.ndarray:
    names = _names(prefix, what, dimensions)
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        problem = f"{path} must hold {names[0]}, as it is or as .gz; it is missing"
        raise ArgumentError("--data", spec, problem)
    try:
        return read_idx(file, dimensions)
    except (OSError, MemoryError, ValueError, EOFError, zlib.error) as error:
        raise_if_machine(error, "--data", str(file))
        raise ArgumentError("--data", spec, f"{file} cannot be read ({error}); download it again") from error


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of bytes (LeCun): big-endian 0x0000 08 DIMENSIONS, the sizes, the values.

    No more memory is taken than the header announces, and at most 268 MB, whatever a .gz would unpack to.

    Returns:
        uint8, with `dimensions` dimensions.

    Raises:
        ValueError: the file has another type or number of dimensions, or more or fewer values than its header says.
        OSError, EOFError, zlib.error: it cannot be read or unpacked.
    """
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        header = stream.read(4 * (1 + dimensions))
        if len(header) < 4 * (1 + dimensions):
            raise ValueError("it is truncated")
        magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
        if magic != 0x800 + dimensions:
            raise ValueError(f"it is no idx file of bytes with {dimensions} dimension{'s' * (dimensions > 1)}")
        size = math.prod(shape)
        if size > _LARGEST:
            raise ValueError(f"its header announces {size:,} bytes, above {_LARGEST:,}")
        values = np.empty(size, dtype=np.uint8)  # filled in pieces: reading would hold it several times
        view, got = values.data, 0
        while got < size and (count := stream.readinto(view[got : got + _PIECE])):
            got += count
        more = stream.read(1)
    if got < size or more:
        raise ValueError(f"it has {'more' if more else 'fewer'} values than its header announces")
    return values.reshape(shape)
