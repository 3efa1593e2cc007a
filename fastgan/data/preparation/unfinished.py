"""What `fastgan prepare` keeps in DST/.preparing until the set is whole, to go on from after a kill.

    asked.json    settings, source and versions that the work was begun with
    items/        one JSON file for each shard: its originals
    listed.json   written when items/ is complete
    looked/       one for each shard: what looking at its originals told
    done/         one for each shard: its finished files
    lock          held while a prepare is at work

Every file is written whole or not at all, so what is there is finished. Nothing here outlives the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fastgan.data.preparation.originals import Item, printable
from fastgan.data.prepared import MANIFEST, UNFINISHED
from fastgan.errors import ArgumentError
from fastgan.utils.files import try_lock, write_atomic

# What a set consists of; a folder with anything else in it is not touched.
_OURS = {UNFINISHED, "cache", "encoded", "labels.npy", "names.jsonl", "classes.json", "skipped.txt", MANIFEST}


class Unfinished:
    """The records of one DST. Numbers are those of shards."""

    def __init__(self, dst: Path) -> None:
        self.dst = dst
        self.folder = dst / UNFINISHED

    def write(self, kind: str, number: int, content: Any) -> None:
        write_atomic(self.folder / kind / f"{number:05}.json", json.dumps(content).encode())

    def read(self, kind: str, number: int) -> Any:
        return json.loads((self.folder / kind / f"{number:05}.json").read_bytes())

    def has(self, kind: str, number: int) -> bool:
        return (self.folder / kind / f"{number:05}.json").is_file()

    def items(self, number: int) -> list[Item]:
        return [Item(*row)._replace(where=tuple(row[3])) for row in self.read("items", number)]

    def write_note(self, name: str, content: dict[str, Any]) -> None:
        write_atomic(self.folder / name, json.dumps(content, indent=1, sort_keys=True).encode())

    def note(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None

    def any_done(self) -> bool:
        return any((self.folder / "done").glob("*.json"))

    def forget(self) -> None:
        """Drop the list of originals and what looking at them told."""
        (self.folder / "listed.json").unlink(missing_ok=True)
        for kind in ("items", "looked"):
            for file in (self.folder / kind).iterdir():
                file.unlink()

    def clear(self, everything: bool = False) -> None:
        """Forget the work, when it is finished or worth nothing; with `everything`, also what was written.

        A DST that is left empty goes too.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        if everything:
            for name in ("cache", "encoded"):
                shutil.rmtree(self.dst / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            self.dst.rmdir()


@contextlib.contextmanager
def locked(dst: Path) -> Iterator[Unfinished]:
    """Make DST where it is missing, and keep other prepares out of it.

    Raises: ArgumentError if it holds something else, cannot be written to, or another prepare is at work on it.
    """
    state = Unfinished(dst)
    with _refused(dst):
        if dst.exists() and not dst.is_dir():
            raise ArgumentError("DST", str(dst), "it is a file; it may be a new folder")
        if dst.is_dir():
            found = sorted(one.name for one in dst.iterdir())
            begun = state.folder.is_dir() or (dst / MANIFEST).is_file()
            foreign = [name for name in found if not begun or not (name in _OURS or fnmatch(name, ".*.part"))]
            if foreign:
                raise ArgumentError("DST", str(dst), f"it holds {foreign[0]}; it may be a new or empty folder")
        state.folder.mkdir(parents=True, exist_ok=True)
    while True:
        with _refused(dst):
            stream = (state.folder / "lock").open("a")
        with stream:
            if not try_lock(stream.fileno()):
                raise ArgumentError("DST", str(dst), "another prepare is at work on it; it may be another folder")
            try:
                same = os.path.samestat(os.fstat(stream.fileno()), os.stat(state.folder / "lock"))
            except FileNotFoundError:
                same = False
            if not same:  # the other one finished, and removed the file, between opening and locking it
                with _refused(dst):
                    state.folder.mkdir(parents=True, exist_ok=True)
                continue
            with _refused(dst):
                for kind in ("items", "looked", "done"):
                    (state.folder / kind).mkdir(exist_ok=True)
                for part in [*dst.glob(".*.part"), *dst.glob("*/.*.part"), *dst.glob("*/*/.*.part")]:
                    part.unlink()
            yield state
            return


@contextlib.contextmanager
def _refused(dst: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = error.filename or dst
        raise ArgumentError("DST", str(dst), f"it cannot be written to ({file}: {error.strerror})") from error


def difference(begun: dict[str, Any], asked: dict[str, Any]) -> tuple[str, object, object] | None:
    """The first setting that differs: its name, as it was begun, as it is asked for."""
    for name in sorted(begun.keys() | asked.keys()):
        if begun.get(name) != asked.get(name):
            return name, begun.get(name), asked.get(name)
    return None


def changed(state: Unfinished, count: int, per_shard: int, found: Iterator[Item]) -> str:
    """What differs between the stored list of originals and the one found now, or ""."""

    def stored() -> Iterator[Item]:
        for number in range(-(-count // per_shard)):
            yield from state.items(number)

    for old, new in zip_longest(stored(), found):
        if old == new:
            continue
        if old is None or (new is not None and new.name < old.name):
            return f"{printable(new.name)} is new"
        if new is None or new.name != old.name:
            return f"{printable(old.name)} is gone"
        return f"{printable(old.name)} has changed"
    return ""
