"""Published sets in their published layout: CIFAR-10 and CelebA. Nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastgan.data.faults import raise_if_machine
from fastgan.data.framing import CROP, Framing
from fastgan.data.images import first_line
from fastgan.data.source_types import ArraySource, FileSource, Source, import_for, require_channels
from fastgan.errors import ArgumentError

_CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the image
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_cifar10(spec: str, root: Path, resolution: int, channels: int | None, split: str = "train") -> Source:
    """50,000 training or 10,000 test images, from the binary version: the "python version" is a set of pickles."""
    require_channels("cifar10", 3, channels)
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    what = "the binary version, cifar-10-binary.tar.gz unpacked"
    pickled = (root / "cifar-10-batches-py").is_dir()
    hint = "; cifar-10-batches-py is the pickled version, and nothing is unpickled" if pickled else ""
    path = _folder_with(spec, root, "cifar-10-batches-bin", names, what, hint)
    parts = []
    for name in names:
        part = np.fromfile(path / name, dtype=np.uint8)
        if not part.size or part.size % _CIFAR10_RECORD or part[::_CIFAR10_RECORD].max() > 9:
            problem = f"{path / name} must hold records of {_CIFAR10_RECORD} bytes, each with a label of 0 to 9 first"
            raise ArgumentError("--data", spec, problem)
        parts.append(part.reshape(-1, _CIFAR10_RECORD))
    records = np.concatenate(parts)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    labels = records[:, 0].astype(np.int64)
    return ArraySource("cifar10", images, labels, resolution, path, _CIFAR10_CLASSES)


def open_celeba(spec: str, root: Path, resolution: int, channels: int | None, framing: Framing = CROP) -> Source:
    """All 202,599 aligned faces, without labels."""
    require_channels("celeba", 3, channels)
    path, names = celeba_files(spec, root)
    try:
        return FileSource(
            "celeba", path, names, framing=framing, resolution=resolution, channels=3, labels=None, num_classes=0
        )
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise_if_machine(error, "--data", str(path))
        raise ArgumentError("--data", spec, f"not all of its {len(names)} images are there ({error})") from error


def celeba_files(spec: str, root: Path) -> tuple[Path, list[str]]:
    """Return the folder of the aligned faces, and their names in the order of the published list.

    torchvision's `CelebA` reads the lists, which are text, and checks their md5 sums.
    """
    celeba = import_for(spec, "torchvision.datasets", "torchvision").CelebA
    path = root / celeba.base_folder
    try:
        names = list(celeba(str(root), split="all", target_type=[], download=False).filename)
    except Exception as error:  # RuntimeError for missing files, ValueError and others for damaged ones
        if not isinstance(error, FileNotFoundError):
            raise_if_machine(error, "--data", str(path))
        lists = [name for _, _, name in celeba.file_list if not name.endswith((".zip", ".7z"))]
        missing = [name for name in ("img_align_celeba", *lists) if not (path / name).exists()]
        problem = f"{path} must hold the folder img_align_celeba and {', '.join(lists)}"
        why = (
            f"missing: {', '.join(missing)}"
            if missing
            else f"one differs from the published file ({first_line(error)})"
        )
        raise ArgumentError("--data", spec, f"{problem}; {why}") from error
    return path / "img_align_celeba", names


def _folder_with(spec: str, root: Path, inner: str, names: list[str], what: str, hint: str = "") -> Path:
    """The folder `inner` below the root, or the root itself without it; it must hold the files `names`."""
    path = root / inner if (root / inner).is_dir() else root
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ArgumentError("--data", spec, f"{root / inner} must hold {what}; missing: {', '.join(missing)}{hint}")
    return path
