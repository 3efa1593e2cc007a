"""Labels of a set of image files from their names, or from the dataset.json of a StyleGAN set."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from fastgan.data.faults import machine_error
from fastgan.data.images import is_image_name
from fastgan.data.source_types import MAX_CLASSES
from fastgan.errors import ArgumentError
from fastgan.utils.text import readable_size

DATASET_JSON = "dataset.json"
MAX_BYTES, MAX_LABELS = 2**26, 2**21
"""Of a dataset.json."""
_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:(?P<object>\{)\s*"labels"\s*:\s*)?(?:(?P<none>null)|\[)')
_ENTRY = re.compile(
    rb'\s*\[\s*(?P<name>"[^"\\]{0,4096}+(?:\\.[^"\\]{0,4096}+){0,999}+")\s*,'
    rb"\s*(?P<label>\[[^\]]{0,9999}\]|[^\s,\[\]]{1,999})\s*\]\s*(?P<end>[],])"
)
_EMPTY, _END = re.compile(rb"\s*\]"), (re.compile(rb"\s*"), re.compile(rb"\s*\}\s*"))
_STORAGE = re.compile(r"\d{5}/img\d{8}\.\w+")


def layout(names: Iterable[str], unwrap: bool = False) -> tuple[str, bool]:
    """Return what the first folders of a set of images are.

    Only files with names of images count: a README or a table beside the folders says nothing of them.

    Args:
        names: of all files, relative to the set or in the archive.
        unwrap: one folder that holds everything is no class, but the set; as in an archive.

    Returns:
        That folder with its "/", or ""; and whether folders below it only keep folders small, as in
        `00000/img00000000.png`, and are no classes.
    """
    firsts: set[str] = set()
    storage, other = [0, 0], [0, 0]  # images in storage folders and in others, counted from the first and second folder
    for name in names:
        if not is_image_name(name):
            continue
        first, slash, rest = name.partition("/")
        if len(firsts) < 2:
            firsts.add(first + slash)
        for level, inner in enumerate((name, rest)):
            if "/" in inner:
                (storage if _STORAGE.fullmatch(inner) else other)[level] += 1
    (wrapper,) = firsts if unwrap and len(firsts) == 1 else ("",)
    wrapper = wrapper if wrapper.endswith("/") else ""
    level = int(bool(wrapper))
    return wrapper, storage[level] > 0 and not other[level]


def label_of(name: str, stored: dict[str, int] | None, storage: bool) -> int | str | None:
    """Return the label of a file: that of a dataset.json, if there is one, else the name of its first folder.

    Args:
        name: of the file, relative to the set.
        stored: labels of the dataset.json.
        storage: folders are no classes; see `layout`. A set with a dataset.json has such folders.
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
        status = table.stat()
        if not stat.S_ISREG(status.st_mode):
            return False, None
        require_bounded(status.st_size, argument, str(table))
        with table.open("rb") as stream:
            content = stream.read(MAX_BYTES)
    except FileNotFoundError:
        return False, None
    except (OSError, MemoryError) as error:
        raise machine_error(argument, str(table), error) from error
    return True, parse_dataset_json(content, argument, str(table))


def parse_dataset_json(content: bytes, argument: str, place: str) -> dict[str, int] | None:
    """Read the labels of a StyleGAN set: {"labels": [["00000/img00000000.png", 6], ...]}, or null for none.

    It is read label by label, which bounds the memory: other JSON takes up to 25 bytes for each of its own.

    Args:
        content: of the file.
        argument, place: the flag and the path to name in errors.

    Returns:
        Name of a file -> label, or None if the set has none.

    Raises:
        ArgumentError: the file has other content, or more than `MAX_LABELS`.
    """
    start = _START.match(content)
    if start is None:
        raise _malformed(argument, place)
    end = _END[start["object"] is not None]
    if start["none"] and start["object"] and end.fullmatch(content, start.end()):
        return None
    labels: dict[str, int] = {}
    at, last = start.end(), False
    if empty := _EMPTY.match(content, at):
        at, last = empty.end(), True
    while not last:
        entry = _ENTRY.match(content, at)
        if entry is None:
            raise _malformed(argument, place)
        try:
            name = str(json.loads(entry["name"])).replace("\\", "/").removeprefix("./")
        except ValueError:
            raise _malformed(argument, place) from None
        if not entry["label"].isdigit() or len(entry["label"]) > 9 or int(entry["label"]) >= MAX_CLASSES:
            problem = f"the label of {name} must be a whole number from 0 to {MAX_CLASSES - 1:,}; else remove the file"
            raise ArgumentError(argument, place, problem)
        labels[name] = int(entry["label"])
        if len(labels) > MAX_LABELS:
            raise ArgumentError(argument, place, f"must have at most {MAX_LABELS:,} labels; it has more")
        at, last = entry.end(), entry["end"] == b"]"
    if not end.fullmatch(content, at):
        raise _malformed(argument, place)
    return labels


def require_bounded(size: int, argument: str, place: str) -> None:
    """Raise ArgumentError for a dataset.json of more than `MAX_BYTES`, before it is read."""
    if size > MAX_BYTES:
        raise ArgumentError(argument, place, f"must have at most {readable_size(MAX_BYTES)}; it is larger")


def _malformed(argument: str, place: str) -> ArgumentError:
    problem = 'must hold {"labels": [["NAME", LABEL], ...]} or {"labels": null}'
    return ArgumentError(argument, place, f"{problem}; repair or remove it")


def without_label(names: Iterable[str], labels: dict[str, int], argument: str, place: str) -> ArgumentError | None:
    """Return the error for the first of `names` that has no label, or None if all have one."""
    missing = next((name for name in names if name not in labels), None)
    if missing is None:
        return None
    return ArgumentError(argument, place, f"it has no label for {missing}: add it, or remove that file or this one")
