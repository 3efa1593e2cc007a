"""Checking a prepared set against its manifest: files are read and hashed in threads."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from fastgan.data.faults import raise_if_machine
from fastgan.data.preparation.context import progress_bar
from fastgan.data.prepared.manifest import MANIFEST, UNFINISHED, Manifest, fingerprint
from fastgan.data.walk import walk
from fastgan.utils.system import cpu_count


class Fault(NamedTuple):
    """A wrong file of a set.

    Attributes:
        name: below the set's folder.
        problem: as in "is missing".
    """

    name: str
    problem: str


def verify(manifest: Manifest, *, workers: int = 0, progress: bool = False) -> Iterator[Fault]:
    """Yield every file that is missing, truncated, changed, or does not belong to the set.

    Args:
        manifest: of the set.
        workers: threads; 0 for one per core. Hashing releases the GIL.
        progress: show a progress bar on stderr, if it is a terminal.

    Raises:
        ArgumentError: the machine cannot read a file now, which says nothing about the set.
    """
    if fingerprint(manifest.files, manifest.settings) != manifest.fingerprint:
        yield Fault(MANIFEST, "has been changed: its fingerprint is not that of its files and settings")
    total = sum(file.bytes for file in manifest.files.values())
    with progress_bar(progress, "verifying", total, unit="B", unit_scale=True) as bar:
        for name, problem in _problems(manifest, list(manifest.files), "DST", workers):
            bar.update(manifest.files[name].bytes)
            if problem:
                yield Fault(name, problem)
    for name, problem in walk(manifest.path, everything=True, flag="DST"):
        if problem:
            yield Fault(name, f"cannot be read ({problem})")
        elif name.startswith(f"{UNFINISHED}/"):
            yield Fault(name, "is left over from `fastgan prepare`; run the same command again to remove it")
        elif name not in manifest.files and name != MANIFEST:
            yield Fault(name, "does not belong to the set")


def spot_check(manifest: Manifest, resolution: int, limit: int = 2**30) -> Fault | None:
    """Return a wrong file among those that a run up to `resolution` reads, or None; checks `limit` bytes at most.

    Raises:
        ArgumentError: the machine cannot read a file now.
    """
    names = [name for at in manifest.resolutions if at <= resolution for name in manifest.files_of(at)]
    names += manifest.tables
    random.Random().shuffle(names)  # not the global generator, which a run may have seeded
    chosen, size = [], 0
    for name in names:
        if size + manifest.files[name].bytes <= limit:
            chosen.append(name)
            size += manifest.files[name].bytes
    return next((Fault(name, problem) for name, problem in _problems(manifest, chosen, "--data") if problem), None)


def _problems(manifest: Manifest, names: list[str], flag: str, workers: int = 0) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(workers or cpu_count()) as pool:
        yield from zip(names, pool.map(lambda name: _problem(manifest, name, flag), names), strict=True)


def _problem(manifest: Manifest, name: str, flag: str) -> str:
    problem = manifest.size_problem(name, flag)
    if problem:
        return problem
    try:
        with (manifest.path / name).open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise_if_machine(error, flag, str(manifest.path / name))
        return f"cannot be read ({error.strerror})"
    expected = manifest.files[name].sha256
    return "" if actual == expected else f"has been changed: its sha256 is {actual[:16]}..., not {expected[:16]}..."
