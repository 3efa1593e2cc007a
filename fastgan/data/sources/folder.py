"""A folder of image files, read as it is."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastgan.data.faults import machine_error, regular_status
from fastgan.data.folder_labels import DATASET_JSON, layout, read_dataset_json, without_label
from fastgan.data.framing import CROP, Framing
from fastgan.data.images import ImageInfo, has_alpha, inspect_image, is_gray
from fastgan.data.source_types import FileSource, Source
from fastgan.data.walk import is_run, walk
from fastgan.errors import ArgumentError, printable

logger = logging.getLogger(__name__)


def open_folder(spec: str, path: Path, resolution: int, channels: int | None, framing: Framing = CROP) -> Source:
    """Every image below `path`, ordered by relative name.

    Labels are those of a dataset.json, or the ranks of first-level subfolders if all images are in one.
    """
    if channels not in (None, 1, 3, 4):
        raise ArgumentError("--channels", channels, "must be 1, 3 or 4; images of a folder are gray, color or RGBA")
    if is_run(path):
        raise ArgumentError("--data", spec, "it is the folder of a run, whose pictures are no data")
    listed = list(walk(path))
    skipped = [(name, problem) for name, problem in listed if problem]
    files = [name for name, problem in listed if not problem and name != DATASET_JSON]
    # Opening waits for the disk more than it computes: more threads than cores are faster.
    with ThreadPoolExecutor(8) as pool:
        inspected = dict(zip(files, pool.map(lambda file: _inspect(path / file), files), strict=True))
    images = {file: info for file, (info, _) in inspected.items() if not info.problem}
    skipped += [(file, info.problem) for file, (info, _) in inspected.items() if info.problem]
    notes = _vector_graphics(file for file, _ in skipped)
    if not images:
        why = f"{path} is empty"
        if skipped:
            why = f"none of the {len(skipped):,} files in {path} is an image (first: {': '.join(skipped[0])})"
        raise ArgumentError("--data", spec, "; ".join([f"must be a folder of images; {why}", *notes]))
    _warn_of_values(printable(spec), images, resolution, framing)
    if channels is None:
        channels = 1 if all(is_gray(info.mode) for info in images.values()) else 3
    names = list(images)
    labels, num_classes, classes, label_notes = _labels(path, names, files)
    kinds = {(info.format, info.mode, info.transparent): file for file, info in images.items()}
    checksums = {file: inspected[file][1] for file in names}
    return FileSource(
        "folder",
        path,
        names,
        kinds,
        checksums,
        framing,
        resolution=resolution,
        channels=channels,
        labels=labels,
        num_classes=num_classes,
        classes=classes,
        skipped=skipped,
        notes=[*_transparency(images, channels, framing), *label_notes, *notes],
    )


def _warn_of_values(spec: str, images: dict[str, ImageInfo], resolution: int, framing: Framing) -> None:
    small = [info.size for info in images.values() if framing.extent(info.size) < resolution]
    if small:
        count = f"{len(small):,} of {len(images):,} images are smaller than {resolution} px"
        logger.warning("%s: %s and are enlarged; the smallest is %d x %d", spec, count, *min(small, key=min))
    floats = [file for file, info in images.items() if info.mode == "F"]
    if floats:
        what = "holds floats; they are read as 0 (black) to 255 (white)"
        logger.warning("%s: %s %s", spec, printable(floats[0]), what)


def _vector_graphics(skipped: Iterable[str]) -> list[str]:
    count = sum(name.lower().endswith((".svg", ".svgz")) for name in skipped)
    if not count:
        return []
    what = "1 SVG file is not read; render it" if count == 1 else f"{count:,} SVG files are not read; render them"
    return [f"{what} to PNG first, with `resvg --width 512 IN.svg OUT.png` or the Python package resvg-py"]


def _transparency(images: dict[str, ImageInfo], channels: int, framing: Framing) -> list[str]:
    count = sum(has_alpha(info) for info in images.values())
    if channels == 4:
        return [f"{count:,} of {len(images):,} images have alpha, which is trained as a fourth channel"]
    if not count:
        return []
    ground = f"they are put on {framing.background} (--background)"
    return [f"{count:,} of {len(images):,} images have alpha: {ground}; --channels 4 trains transparency"]


def _labels(path: Path, names: list[str], files: list[str]) -> tuple[np.ndarray | None, int, list[str], list[str]]:
    """Labels, number of classes, their names, and notes about them.

    Args:
        names: of the images.
        files: all, with those that are no images, as `fastgan prepare` sees them before it opens any.

    Raises:
        ArgumentError: dataset.json is damaged or lacks a file.
    """
    stored, found = read_dataset_json(path, "--data")
    if stored:
        if found is None:
            return None, 0, [], []
        error = without_label(names, found, "--data", str(path / DATASET_JSON))
        if error is not None:
            raise error
        labels = np.array([found[name] for name in names], dtype=np.int64)
        return labels, int(labels.max()) + 1, [], []
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names) or layout(files)[1]:
        return None, 0, [], []
    if loose:
        where = f"{loose[0]} and {len(loose) - 1:,} others are" if len(loose) > 1 else f"{loose[0]} is"
        return (
            None,
            0,
            [],
            [f"no labels: {where} in no subfolder; without loose images, the subfolders are classes"],
        )
    classes, ranks = np.unique([name.partition("/")[0] for name in names], return_inverse=True)
    notes = [f"1 class: every image is in the folder {classes[0]}"] if len(classes) == 1 else []
    return ranks.astype(np.int64), len(classes), classes.tolist(), notes


def _inspect(file: Path) -> tuple[ImageInfo, int]:
    _, problem = regular_status(file, "--data", str(file))
    if problem:
        return ImageInfo(problem), 0
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
