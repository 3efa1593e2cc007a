"""Image files and small copies of published sets in their own layouts."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from fastgan.data.images import ImageInfo
from fastgan.data.preparation import collection


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes: uint8 of `shape`."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | None = None, **options: Any) -> Path:
    """Write `pixels`, by default noise of 20 x 20, as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(20, 20, 3) if pixels is None else pixels).save(path, **options)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Name below `folder` -> content, of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cifar10(root: Path, per_file: int = 4) -> np.ndarray:
    """Write five files in the layout of CIFAR-10's binary version; return the records."""
    records = noise(5 * per_file, 3073)
    records[:, 0] %= 10
    root.mkdir(parents=True)
    for i in range(5):
        (root / f"data_batch_{i + 1}.bin").write_bytes(records[i * per_file : (i + 1) * per_file].tobytes())
    return records


def mnist(
    raw: Path, count: int = 6, *, packed: bool = False, mark: str = "-", split: str = "train", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Write the two files of a split in MNIST's idx layout; return images and labels.

    Args:
        packed: as .gz.
        mark: between the name and "idx".
    """
    images, labels = noise(count, 28, 28, seed=seed), np.arange(count, dtype=np.uint8) % 10
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (f"{split}-images{mark}idx3-ubyte", struct.pack(">4i", 2051, count, 28, 28) + images.tobytes()),
        (f"{split}-labels{mark}idx1-ubyte", struct.pack(">2i", 2049, count) + labels.tobytes()),
    ):
        (raw / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
    return images, labels


def celeba(root: Path, count: int = 3) -> None:
    """Write a small data set in CelebA's layout, images of 178 x 218."""
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        save(root / "img_align_celeba" / name, noise(218, 178, 3, seed=i))
    for file, header, values in (
        ("list_eval_partition.txt", "", "0"),
        ("identity_CelebA.txt", "", "7"),
        ("list_bbox_celeba.txt", f"{count}\nx_1 y_1\n", "1 2"),
        ("list_landmarks_align_celeba.txt", f"{count}\nx y\n", "1 2"),
        ("list_attr_celeba.txt", f"{count}\nMale Young\n", "1 -1"),
    ):
        (root / file).write_text(header + "".join(f"{name} {values}\n" for name in names))


def save_broken(path: Path, side: int) -> Path:
    """Write a PNG with right checksums and damaged compressed pixels: only decoding detects it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", b"\x78\x9c" + bytes(range(256)) * 8) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def miss_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the inspection of `fastgan prepare` take the files of `save_broken` for whole, as if they changed later."""
    inspect = collection.inspect_image

    def lenient(open_file: Callable[[], BinaryIO], name: str, flag: str) -> ImageInfo:
        info = inspect(open_file, name, flag)
        return ImageInfo("", "RGB", (32, 32), "PNG") if "broken" in name else info

    monkeypatch.setattr(collection, "inspect_image", lenient)
