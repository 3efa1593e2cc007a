"""Labels of a set of image files from their names, or from the dataset.json of a StyleGAN set."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgan.data.faults import machine_error
from fastgan.data.source_types import MAX_CLASSES
from fastgan.errors import ArgumentError
from fastgan.utils.stored_values import MALFORMED

DATASET_JSON = "dataset.json"
MAX_BYTES = 2**28  # of a dataset.json: some 6 million labels
_STORAGE = re.compile(r"\d{5}/img\d{8}\.\w+")


def is_storage(names: Iterable[str]) -> bool:
    """Return whether first-level folders only keep folders small, as in `00000/img00000000.png`, and are no classes."""
    return all(_STORAGE.fullmatch(name) for name in names)


def label_of(name: str, stored: dict[str, int] | None, storage: bool) -> int | str | None:
    """Return the label of a file: that of a dataset.json, if there is one, else the name of its first folder.

    Args:
        name: of the file, relative to the set.
        stored: labels of the dataset.json.
        storage: folders are no classes; see `is_storage`. A set with a dataset.json has such folders.
    """
    if stored is not None:
        return stored.get(name)
    folder, slash, _ = name.partition("/")
    return folder if slash and not storage else None


def read_dataset_json(folder: Path, argument: str) -> tuple[bool, dict[str, int] | None]:
    """Return whether a folder has a dataset.json, and its labels; see `parse_dataset_json`.

    Raises:
        ArgumentError: the file has other content, or the machine cannot read it now.
    """
    table = folder / DATASET_JSON
    try:
        if not stat.S_ISREG(table.stat().st_mode):
            return False, None
        with table.open("rb") as stream:
            content = stream.read(MAX_BYTES)
    except FileNotFoundError:
        return False, None
    except (OSError, MemoryError) as error:
        raise machine_error(argument, str(table), error) from error
    return True, parse_dataset_json(content, argument, str(table))


def parse_dataset_json(content: bytes, argument: str, place: str) -> dict[str, int] | None:
    """Read the labels of a StyleGAN set: {"labels": [["00000/img00000000.png", 6], ...]}, or null for none.

    Args:
        content: of the file.
        argument, place: the flag and the path to name in errors.

    Returns:
        Name of a file -> label, or None if the set has none.

    Raises:
        ArgumentError: the file has other content.
    """
    try:
        found: Any = json.loads(content)
        pairs = found["labels"] if isinstance(found, dict) else found
        if pairs is None:
            return None
        labels = {name.replace("\\", "/").removeprefix("./"): label for name, label in pairs}
    except MALFORMED:
        problem = 'must hold {"labels": [["NAME", LABEL], ...]} or {"labels": null}'
        raise ArgumentError(argument, place, f"{problem}; repair or remove it") from None
    wrong = next(
        (name for name, label in labels.items() if type(label) is not int or not 0 <= label < MAX_CLASSES), None
    )
    if wrong is not None:
        problem = f"the label of {wrong} must be a whole number from 0 to {MAX_CLASSES - 1:,}; else remove the file"
        raise ArgumentError(argument, place, problem)
    return labels


def without_label(names: Iterable[str], labels: dict[str, int], argument: str, place: str) -> ArgumentError | None:
    """Return the error for the first of `names` that has no label, or None if all have one."""
    missing = next((name for name in names if name not in labels), None)
    if missing is None:
        return None
    return ArgumentError(argument, place, f"it has no label for {missing}: add it, or remove that file or this one")
