"""The state of an unfinished `fastgan prepare` in DST/.preparing, from which the same command resumes after a kill.

    asked.json    settings, source and versions of the command
    items/        one JSON file per shard: its input images
    listed.json   written when items/ is complete
    looked/       one per shard: results of inspecting its images
    done/         one per shard: its finished files
    lock          locked while a prepare is active

Every file is written atomically, so that existing files are complete. The folder is removed when the set is finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from fastgan.data.images import first_line
from fastgan.data.preparation.collection import InputImage
from fastgan.data.prepared.manifest import CLASSES, LABELS, MANIFEST, NAMES, SKIPPED, UNFINISHED
from fastgan.errors import ArgumentError
from fastgan.utils.files import FileRecord, open_appending, read_regular, try_lock, write_atomic
from fastgan.utils.stored_values import MALFORMED

# All files and folders of a set; a DST that has others is refused.
_OWN_NAMES = {UNFINISHED, "cache", "encoded", LABELS, NAMES, CLASSES, SKIPPED, MANIFEST}


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting one input image.

    Attributes:
        problem: why it is not a usable image, or "".
        width: px.
        height: px.
        gray: whether it has no color.
    """

    problem: str
    width: int
    height: int
    gray: bool


@dataclass(frozen=True)
class FinishedShard:
    """A finished shard.

    Attributes:
        first: global index of its first image.
        count: number of its images.
        late: place in the shard -> problem of images that turned out to be damaged when they were decoded.
        files: name below DST -> size and hash.
    """

    first: int
    count: int
    late: dict[int, str]
    files: dict[str, FileRecord]

    def is_complete(self, dst: Path) -> bool:
        """Return whether all its files exist with their sizes."""
        try:
            return all(os.stat(dst / name).st_size == record.bytes for name, record in self.files.items())
        except OSError:
            return False


class PreparationState:
    """The records of one DST."""

    def __init__(self, dst: Path) -> None:
        self.dst = dst
        self.folder = dst / UNFINISHED

    def write(self, kind: str, shard: int, content: Any) -> None:
        """Write the record of a shard. kind: items, looked or done."""
        write_atomic(self.folder / kind / f"{shard:05}.json", json.dumps(content).encode())

    def read(self, kind: str, shard: int) -> Any:
        """Read the record of a shard."""
        with self._described(f"{kind}/{shard:05}.json"):
            return json.loads(read_regular(self.folder / kind / f"{shard:05}.json"))

    def has(self, kind: str, shard: int) -> bool:
        """Return whether a shard has a record."""
        return (self.folder / kind / f"{shard:05}.json").is_file()

    def images(self, shard: int) -> list[InputImage]:
        """Return the input images of a shard."""
        with self._described(f"items/{shard:05}.json"):
            return [InputImage(*row)._replace(location=tuple(row[3])) for row in self.read("items", shard)]

    def inspections(self, shard: int) -> list[Inspection]:
        """Return the inspections of the images of a shard, in the same order."""
        with self._described(f"looked/{shard:05}.json"):
            return [
                Inspection(str(row[0]), int(row[1]), int(row[2]), bool(row[3])) for row in self.read("looked", shard)
            ]

    def finished(self, shard: int) -> FinishedShard:
        """Return the record of a finished shard."""
        content = self.read("done", shard)
        with self._described(f"done/{shard:05}.json"):
            late = {int(at): str(problem) for at, problem in content["late"].items()}
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            return FinishedShard(int(content["first"]), int(content["count"]), late, files)

    def write_finished(self, shard: int, finished: FinishedShard) -> None:
        """Record that a shard is finished."""
        self.write("done", shard, asdict(finished))

    def write_note(self, name: str, content: dict[str, Any]) -> None:
        """Write a record of the whole preparation: asked.json or listed.json."""
        write_atomic(self.folder / name, json.dumps(content, indent=1, sort_keys=True).encode())

    def note(self, name: str) -> dict[str, Any] | None:
        """Read a record of the whole preparation, or return None."""
        try:
            with self._described(name):
                content = dict(json.loads(read_regular(self.folder / name)))
                if name == "listed.json" and not (type(content["count"]) is int and type(content["digest"]) is str):
                    raise ValueError("count and digest")
                return content
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _described(self, name: str) -> Iterator[None]:
        """Report a record that was edited or damaged."""
        try:
            yield
        except MALFORMED as error:
            if isinstance(error, ArgumentError):
                raise
            problem = f"{self.folder.name}/{name} is damaged ({first_line(error)}); delete {self.dst} to start again"
            raise ArgumentError("DST", str(self.dst), problem) from None

    def any_finished(self) -> bool:
        """Return whether a shard is finished."""
        return any((self.folder / "done").glob("*.json"))

    def forget_images(self) -> None:
        """Remove the list of input images, and their inspections."""
        (self.folder / "listed.json").unlink(missing_ok=True)
        for kind in ("items", "looked"):
            for file in (self.folder / kind).iterdir():
                file.unlink()

    def remove(self, everything: bool = False) -> None:
        """Remove the state, and with `everything` the written images; also DST if it is empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if everything:
            for name in ("cache", "encoded"):
                shutil.rmtree(self.dst / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            self.dst.rmdir()


@contextlib.contextmanager
def lock_destination(dst: Path) -> Iterator[PreparationState]:
    """Create DST if it is missing, and lock it against other prepares.

    Raises:
        ArgumentError: it holds other files, cannot be written to, or another prepare is active.
    """
    state = PreparationState(dst)
    try:
        _require_own_files(state)
        lock = _lock(state)
        for kind in ("items", "looked", "done"):
            (state.folder / kind).mkdir(exist_ok=True)
        for part in [*dst.glob(".*.part"), *dst.glob("*/.*.part"), *dst.glob("*/*/.*.part")]:
            part.unlink()
    except OSError as error:
        problem = f"it cannot be written to ({error.filename or dst}: {error.strerror})"
        raise ArgumentError("DST", str(dst), problem) from error
    with lock:
        yield state


def _require_own_files(state: PreparationState) -> None:
    dst = state.dst
    if dst.exists() and not dst.is_dir():
        raise ArgumentError("DST", str(dst), "must be a new or empty folder; it is a file")
    started = state.folder.is_dir() or (dst / MANIFEST).is_file()
    for name in sorted(one.name for one in dst.iterdir()) if dst.is_dir() else []:
        if not started or not (name in _OWN_NAMES or fnmatch(name, ".*.part")):
            raise ArgumentError("DST", str(dst), f"must be a new or empty folder; it holds {name}")


def _lock(state: PreparationState) -> IO[str]:
    """Create and lock the lock file; the lock lasts until the returned file is closed."""
    while True:
        state.folder.mkdir(parents=True, exist_ok=True)
        file = open_appending(state.folder / "lock")
        if not try_lock(file.fileno()):
            file.close()
            raise ArgumentError("DST", str(state.dst), "another prepare is writing to it; use another folder")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(state.folder / "lock")):
                return file
        file.close()  # another prepare finished and removed the file between opening and locking it
