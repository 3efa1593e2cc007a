"""The manifest of a prepared set: format, file names, reading, writing and checking. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.faults import exists, raise_if_machine
from fastgan.data.images import first_line
from fastgan.data.prepared.mapping import load_npy, map_npy
from fastgan.errors import ArgumentError
from fastgan.utils.files import FileRecord, read_regular, write_atomic
from fastgan.utils.stored_values import MALFORMED

FORMAT = "fastgan-prepared"
SCHEMA = 1
MANIFEST = "manifest.json"
UNFINISHED = ".preparing"  # folder with the state of an unfinished `prepare`
LABELS, NAMES, CLASSES, SKIPPED = "labels.npy", "names.jsonl", "classes.json", "skipped.txt"
# Encoding -> suffix of its members in a tar. DALI and webdataset know all three.
SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_VERIFY = "run `fastgan data verify` to list all such files"


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of images that share files: global indices [first, first + count)."""

    first: int
    count: int


@dataclass(frozen=True)
class Manifest:
    """The contents of a prepared set. Checked to be consistent when it is read.

    Attributes:
        path: folder of the set.
        version: of the fastgan that wrote it.
        count: images, N.
        channels: 1 or 3.
        resolution: the target, px.
        resolutions: every power of two from 4 to the target.
        cached: the lowest of them, which are stored as arrays; the others are stored as image files.
        encoding: of the image files: jpeg, png or webp.
        num_classes: 0 without labels.
        fingerprint: 16 hex digits that change with any file or setting.
        settings: of `fastgan prepare`.
        source: kind, name and digest of the images it was prepared from.
        skipped: number of input files that were not used.
        shards: in order.
        files: name below `path`, with "/" between parts -> size and hash.
    """

    path: Path
    version: str
    count: int
    channels: int
    resolution: int
    resolutions: tuple[int, ...]
    cached: tuple[int, ...]
    encoding: str
    num_classes: int
    fingerprint: str
    settings: dict[str, Any]
    source: dict[str, Any]
    skipped: int
    shards: tuple[Shard, ...]
    files: dict[str, FileRecord] = field(repr=False)

    def files_of(self, resolution: int) -> list[str]:
        """Return the names of all files of one resolution, in order.

        Raises:
            ArgumentError: the set does not have the resolution.
        """
        if resolution not in self.resolutions:
            available = ", ".join(map(str, self.resolutions))
            raise ArgumentError("--resolution", resolution, f"must be one of {available}; {self.path} has no other")
        numbers = range(len(self.shards))
        if resolution in self.cached:
            return [cache_file(resolution, shard) for shard in numbers]
        tars = [name for shard in numbers for name in (tar_file(resolution, shard), index_file(resolution, shard))]
        return [*tars, offsets_file(resolution)]

    @property
    def tables(self) -> list[str]:
        """Names of the files that belong to no resolution."""
        labels = [LABELS] if self.num_classes else []
        return [*labels, NAMES, SKIPPED, *([CLASSES] if CLASSES in self.files else [])]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first global index of each shard: int64 [shards]."""
        return np.array([shard.first for shard in self.shards], dtype=np.int64)

    def require_files(self, resolution: int, flag: str = "--data") -> None:
        """Check that the files of one resolution, and the labels, exist with the sizes in the manifest.

        Raises:
            ArgumentError: a file is missing or has another size; the message names the first.
        """
        for name in [*self.files_of(resolution), *([LABELS] if self.num_classes else [])]:
            self._require_file(name, flag)

    def _require_file(self, name: str, flag: str) -> None:
        problem = self.size_problem(name, flag)
        if problem:
            raise ArgumentError(flag, str(self.path), f"{name} {problem}; {_VERIFY}")

    def size_problem(self, name: str, flag: str = "--data") -> str:
        """Return what is wrong with a file as far as its size tells, as in "is missing"; "" if nothing is.

        Raises:
            ArgumentError: the machine cannot tell now.
        """
        expected = self.files[name].bytes
        try:
            size = (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        except OSError as error:
            raise_if_machine(error, flag, str(self.path / name))
            return f"cannot be read ({error.strerror})"
        if size < expected:
            return f"is truncated: {size:,} of {expected:,} bytes"
        return "" if size == expected else f"is too long: {size:,} bytes instead of {expected:,}"

    def labels(self, flag: str = "--data") -> np.ndarray | None:
        """Return int64 [N], or None for a set without labels.

        Raises:
            ArgumentError: the file is damaged, or a label is not a number of one of the classes.
        """
        if not self.num_classes:
            return None
        labels = self.array(LABELS, np.int64, (self.count,), flag, mmap=False)
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.num_classes:
            problem = f"{LABELS} holds {lowest} to {highest}, and the classes are 0 to {self.num_classes - 1}"
            raise ArgumentError(flag, str(self.path), f"{problem}; {_VERIFY}")
        return labels

    def array(self, name: str, dtype: Any, shape: tuple[int, ...], flag: str, mmap: bool = True) -> np.ndarray:
        """Return the array in a .npy file of the set, memory-mapped by default, without a file descriptor.

        Raises:
            ArgumentError: the file is damaged, or holds another dtype or shape; or the machine cannot read it now.
        """
        file, problem = self.path / name, ""
        try:
            array = map_npy(file) if mmap else load_npy(file)
        except Exception as error:  # a damaged header goes through Python's tokenizer, which raises many kinds
            raise_if_machine(error, flag, str(file))
            problem = first_line(error)
        if problem:
            raise ArgumentError(flag, str(file), f"it is not a whole .npy file ({problem}); {_VERIFY}")
        if array.shape != shape or array.dtype != dtype:
            problem = f"{name} holds {array.dtype} {list(array.shape)} instead of {np.dtype(dtype)} {list(shape)}"
            raise ArgumentError(flag, str(self.path), problem)
        return array

    def names(self, flag: str = "--data") -> Iterator[str]:
        """Yield the source name of each image, in order, reading line by line."""
        self._require_file(NAMES, flag)
        with (self.path / NAMES).open("rb") as lines:
            for line in lines:
                yield self._parse_json(line, NAMES, flag)

    def classes(self, flag: str = "--data") -> list[str] | None:
        """Return the class names by label, or None if the source had none."""
        if CLASSES not in self.files:
            return None
        self._require_file(CLASSES, flag)
        names = self._parse_json((self.path / CLASSES).read_bytes(), CLASSES, flag)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ArgumentError(flag, str(self.path), f"{CLASSES} is damaged (it is no list of names); {_VERIFY}")
        return names

    def _parse_json(self, text: bytes, name: str, flag: str) -> Any:
        try:
            return json.loads(text)
        except MALFORMED as error:
            raise ArgumentError(flag, str(self.path), f"{name} is damaged ({error}); {_VERIFY}") from None


def cache_file(resolution: int, shard: int) -> str:
    """Name of a shard of a cached resolution: uint8 [n, C, resolution, resolution], .npy."""
    return f"cache/{resolution:04}/{shard:05}.npy"


def tar_file(resolution: int, shard: int) -> str:
    """Name of a shard of an encoded resolution: a webdataset tar."""
    return f"encoded/{resolution:04}/{shard:05}.tar"


def index_file(resolution: int, shard: int) -> str:
    """Name of DALI's index of `tar_file`."""
    return f"encoded/{resolution:04}/{shard:05}.idx"


def offsets_file(resolution: int) -> str:
    """Name of the table of an encoded resolution: int64 [N, 2], offset and length of each image in its tar."""
    return f"encoded/{resolution:04}/offsets.npy"


def is_prepared(path: str | Path, flag: str = "--data") -> bool:
    """Return whether `path` is a folder with a manifest of this format, which may be damaged.

    Raises:
        ArgumentError: it has a manifest.json, which cannot be read now.
    """
    file = Path(path) / MANIFEST
    try:
        return f'"format": "{FORMAT}"'.encode() in read_regular(file)
    except (OSError, MemoryError) as error:
        if not isinstance(error, PermissionError) and exists(file, flag):
            raise_if_machine(error, flag, str(file))
        return False


def unfinished_problem(path: Path, flag: str = "--data") -> str:
    """Return the error message for a set that `prepare` has not finished, or "" for any other folder."""
    if not exists(path / UNFINISHED, flag):
        return ""
    return "the prepared set is not finished; run the same `fastgan prepare` command again to finish it"


def read_manifest(path: str | Path, flag: str = "--data") -> Manifest:
    """Open a prepared set. Reads one file, whatever the number of images.

    Args:
        path: folder of the set.
        flag: the argument to name in errors.

    Raises:
        ArgumentError: there is no manifest, it has another format or schema, or it contradicts itself.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        content = json.loads(read_regular(file))
    except FileNotFoundError:
        problem = unfinished_problem(path, flag) or f"must be a prepared set; {file} is missing"
        raise ArgumentError(flag, str(path), problem) from None
    except OSError as error:
        raise ArgumentError(flag, str(path), f"{file} cannot be read ({error.strerror})") from None
    except MALFORMED as error:
        raise ArgumentError(flag, str(path), f"{file} is damaged ({error}); prepare the set again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArgumentError(flag, str(path), f"{file} does not have the format {FORMAT}")
    if content.get("schema") != SCHEMA:
        raise ArgumentError(flag, str(path), f"{file} has schema {content.get('schema')}; this version reads {SCHEMA}")
    try:
        manifest = _parse(path, content)
        problem = _contradiction(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ArgumentError(flag, str(path), f"{file} is damaged ({problem}); prepare the set again")
    return manifest


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` atomically. Its existence makes a folder a prepared set."""
    content: dict[str, Any] = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    del content["path"]
    content |= {"format": FORMAT, "schema": SCHEMA}
    content["shards"] = [asdict(shard) for shard in manifest.shards]
    content["files"] = {name: asdict(record) for name, record in manifest.files.items()}
    write_atomic(manifest.path / MANIFEST, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def fingerprint(files: dict[str, FileRecord], settings: dict[str, Any]) -> str:
    """Return 16 hex digits that change with any file or setting."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(files):
        digest.update(f"\0{name}\0{files[name].sha256}".encode())
    return digest.hexdigest()[:16]


def _parse(path: Path, content: dict[str, Any]) -> Manifest:
    plain: dict[str, Any] = {"version": str, "encoding": str, "fingerprint": str, "settings": dict, "source": dict}
    plain |= dict.fromkeys(("count", "channels", "resolution", "num_classes", "skipped"), int)
    return Manifest(
        path=path,
        resolutions=tuple(int(r) for r in content["resolutions"]),
        cached=tuple(int(r) for r in content["cached"]),
        shards=tuple(Shard(int(one["first"]), int(one["count"])) for one in content["shards"]),
        files={name: FileRecord(int(one["bytes"]), str(one["sha256"])) for name, one in content["files"].items()},
        **{name: convert(content[name]) for name, convert in plain.items()},
    )


def _contradiction(manifest: Manifest) -> str:
    """The first contradiction in a manifest, or ""."""
    resolutions = [2**i for i in range(2, manifest.resolution.bit_length())]
    if list(manifest.resolutions) != resolutions or resolutions[-1:] != [manifest.resolution]:
        return f"resolutions: {list(manifest.resolutions)}"
    if list(manifest.cached) != resolutions[: len(manifest.cached)]:
        return f"cached: {list(manifest.cached)}"
    if manifest.channels not in (1, 3) or manifest.encoding not in SUFFIXES:
        return f"channels: {manifest.channels}, encoding: {manifest.encoding}"
    first = 0
    for number, shard in enumerate(manifest.shards):
        if shard.first != first or shard.count < 0:
            return f"shard {number} has images {shard.first} to {shard.first + shard.count}"
        first += shard.count
    if first != manifest.count or first < 1:
        return f"{first} images in shards, count {manifest.count}"
    expected = {name for resolution in resolutions for name in manifest.files_of(resolution)} | set(manifest.tables)
    wrong = sorted(expected ^ manifest.files.keys())
    return f"{wrong[0]} is {'not listed' if wrong[0] in expected else 'not a file of such a set'}" if wrong else ""
