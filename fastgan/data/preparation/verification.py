"""Is a prepared set still what was written? Its files are read and hashed, by several threads."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fastgan.data.prepared import MANIFEST, UNFINISHED, Manifest, fingerprint
from fastgan.data.walk import walk


class Fault(NamedTuple):
    """A file below the set's folder, and what is wrong with it, to follow its name."""

    name: str
    what: str


def verify(manifest: Manifest, *, workers: int = 0, progress: bool = False) -> Iterator[Fault]:
    """Every file that is missing, cut, changed or none of the set's, as it is found.

    workers: threads, 0 for one per core; hashing lets go of Python's lock. progress: a bar on stderr, where that is
    a terminal.
    """
    from tqdm import tqdm

    if fingerprint(manifest.files, manifest.settings) != manifest.fingerprint:
        yield Fault(MANIFEST, "has been changed: its fingerprint is not that of its files and settings")
    total = sum(file.bytes for file in manifest.files.values())
    bar: Any = tqdm(
        total=total, desc="verifying", unit="B", unit_scale=True, disable=None if progress else True, dynamic_ncols=True
    )
    with bar, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for name, what in zip(manifest.files, pool.map(lambda one: _fault(manifest, one), manifest.files), strict=True):
            bar.update(manifest.files[name].bytes)
            if what:
                yield Fault(name, what)
    for name, reason in walk(manifest.path, everything=True):
        if reason:
            yield Fault(name, f"cannot be read ({reason})")
        elif name.startswith(f"{UNFINISHED}/"):
            yield Fault(name, "is left over from preparing; the command that prepared the set removes it")
        elif name not in manifest.files and name != MANIFEST:
            yield Fault(name, "does not belong to the set")


def spot_check(manifest: Manifest, resolution: int, limit: int = 2**30) -> Fault | None:
    """A changed file, if there is one among those that a run to `resolution` reads; of over `limit` bytes a part."""
    names = [name for at in manifest.resolutions if at <= resolution for name in manifest.files_of(at)]
    names += manifest.tables
    random.Random().shuffle(names)  # not the generator that a run may have seeded
    chosen, held = [], 0
    for name in names:
        if held + manifest.files[name].bytes <= limit:
            chosen.append(name)
            held += manifest.files[name].bytes
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name, what in zip(chosen, pool.map(lambda one: _fault(manifest, one), chosen), strict=True):
            if what:
                return Fault(name, what)
    return None


def _fault(manifest: Manifest, name: str) -> str:
    what = manifest.fault(name)
    if what:
        return what
    try:
        with (manifest.path / name).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    wanted = manifest.files[name].sha256
    return "" if found == wanted else f"has been changed: its sha256 is {found[:16]}..., and was {wanted[:16]}..."
