"""The files below a folder, in order of their names; runs are left out, as their sample sheets are no data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastgan.data.faults import exists, raise_if_machine


def walk(path: Path, everything: bool = False, flag: str = "--data") -> Iterator[tuple[str, str]]:
    """Yield (name, problem) of the files below `path`, sorted by name.

    The names of one folder are held in memory while its files are listed: about 80 bytes each.
    Links are followed, except to a folder that was visited before.

    Args:
        path: the folder.
        everything: include hidden files and folders, and the runs of fastgan.
        flag: the argument to name in errors.

    Yields:
        name: relative to `path`, with "/" between parts. problem: "", or why a folder is not listed.

    Raises:
        ArgumentError: the machine cannot list a folder.
    """
    visited: set[str] = set()

    def below(folder: str) -> Iterator[tuple[str, str]]:
        real = os.path.realpath(path / folder)
        if real in visited:
            return
        visited.add(real)
        if folder and not everything and is_run(path / folder, flag):
            yield folder, "the folder of a run, whose pictures are no data"
            return
        try:
            # Folders are sorted as "a/", so that the order is that of the whole relative names.
            with os.scandir(path / folder) as entries:
                shown = (entry for entry in entries if everything or entry.name[0] != ".")
                names = sorted(entry.name + "/" * is_folder(entry, flag) for entry in shown)
        except OSError as error:
            raise_if_machine(error, flag, str(path / folder))
            yield folder, error.strerror or str(error)
            return
        for name in names:
            if name.endswith("/"):
                yield from below(folder + name)
            else:
                yield folder + name, ""

    return below("")


def is_run(path: Path, flag: str = "--data") -> bool:
    """Return whether a folder is that of a run of fastgan."""
    try:
        if not exists(path / "config.yaml", flag):
            return False
        return any(exists(path / name, flag) for name in (".lock", "checkpoints", "samples", "metrics.jsonl"))
    except PermissionError:  # then nothing in it can be read
        return False


def is_folder(entry: os.DirEntry[str], flag: str) -> bool:
    """Return False also for a link to itself, or to a folder that may not be read."""
    try:
        return entry.is_dir()
    except OSError as error:
        raise_if_machine(error, flag, entry.path)
        return False
