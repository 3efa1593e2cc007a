"""A folder of image files, read as it is."""

from __future__ import annotations

import logging
import os
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastgan.data.faults import machine_error, raise_if_machine
from fastgan.data.images import ImageInfo, inspect_image, is_gray
from fastgan.data.source import FileSource, Source
from fastgan.data.walk import walk
from fastgan.errors import ArgumentError, printable

logger = logging.getLogger(__name__)


def open_folder(spec: str, path: Path, resolution: int, channels: int | None) -> Source:
    """Every image below `path`, ordered by relative name; labels are the ranks of first-level subfolders."""
    if channels not in (None, 1, 3):
        raise ArgumentError("--channels", channels, "must be 1 or 3; images of a folder are gray or color")
    listed = list(walk(path))
    skipped = [(name, problem) for name, problem in listed if problem]
    files = [name for name, problem in listed if not problem]
    # Opening waits for the disk more than it computes: more threads than cores are faster.
    with ThreadPoolExecutor(8) as pool:
        inspected = dict(zip(files, pool.map(lambda file: _inspect(path / file), files), strict=True))
    images = {file: info for file, (info, _) in inspected.items() if not info.problem}
    skipped += [(file, info.problem) for file, (info, _) in inspected.items() if info.problem]
    if not images:
        why = f"{path} is empty"
        if skipped:
            why = f"none of the {len(skipped):,} files in {path} is an image (first: {': '.join(skipped[0])})"
        raise ArgumentError("--data", spec, f"must be a folder of images; {why}")
    small = [info.size for info in images.values() if min(info.size) < resolution]
    if small:
        count = f"{len(small):,} of {len(images):,} images are smaller than {resolution} px"
        logger.warning("%s: %s and are enlarged; the smallest is %d x %d", printable(spec), count, *min(small, key=min))
    floats = [file for file, info in images.items() if info.mode == "F"]
    if floats:
        what = "holds floats; they are read as 0 (black) to 255 (white)"
        logger.warning("%s: %s %s", printable(spec), printable(floats[0]), what)
    if channels is None:
        channels = 1 if all(is_gray(info.mode) for info in images.values()) else 3
    names = list(images)
    labels, num_classes, unlabeled = None, 0, [name for name in names if "/" not in name]
    if 0 < len(unlabeled) < len(names) / 2:
        logger.warning(
            "%s: no labels, because %s is in no subfolder; move it into that of its class", spec, unlabeled[0]
        )
    if not unlabeled:
        classes, ranks = np.unique([name.partition("/")[0] for name in names], return_inverse=True)
        labels, num_classes = ranks.astype(np.int64), len(classes)
    kinds = {(info.format, info.mode, info.transparent): file for file, info in images.items()}
    checksums = {file: inspected[file][1] for file in names}
    return FileSource(
        "folder",
        path,
        names,
        kinds,
        checksums,
        resolution=resolution,
        channels=channels,
        labels=labels,
        num_classes=num_classes,
        skipped=skipped,
    )


def _inspect(file: Path) -> tuple[ImageInfo, int]:
    try:
        regular = stat.S_ISREG(file.stat().st_mode)  # opening a named pipe would block forever
    except OSError as error:
        regular = False
        if not file.is_symlink():  # one that leads nowhere
            raise_if_machine(error, "--data", str(file))
    if not regular:
        return ImageInfo("not a regular file"), 0
    info = inspect_image(lambda: file.open("rb"), str(file))
    return info, 0 if info.problem else _checksum(file)


def _checksum(file: Path) -> int:
    """CRC-32 of 4 kB in the middle: tells files of one size apart, and is the same for a copy on another host."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096) // 2)
            return zlib.crc32(stream.read(4096))
    except OSError as error:
        raise machine_error("--data", str(file), error) from error
