"""A prepared set on disk: what `fastgan prepare` writes and training reads. docs/data.md describes every file.

Its manifest is written last, so a folder with a manifest is whole. Nothing in it is unpickled.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.errors import ArgumentError

FORMAT = "fastgan-prepared"
SCHEMA = 1
MANIFEST = "manifest.json"
LABELS, NAMES, CLASSES, SKIPPED = "labels.npy", "names.jsonl", "classes.json", "skipped.txt"
# Encoding -> what its members in a tar end with. DALI and webdataset know all three.
SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of images that share files: global indices [first, first + count)."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class File:
    """What the manifest says of a file: its size and its sha256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared set says of itself, checked to be complete. `path`: its folder; the rest as in docs/data.md."""

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
    files: dict[str, File] = field(repr=False)

    def cache_file(self, resolution: int, shard: int) -> str:
        """Of a cached resolution: uint8 [n, C, resolution, resolution], .npy. Below `path`, "/" between parts."""
        return cache_file(resolution, shard)

    def tar_file(self, resolution: int, shard: int) -> str:
        """Of an encoded resolution: a webdataset tar."""
        return tar_file(resolution, shard)

    def index_file(self, resolution: int, shard: int) -> str:
        """Of an encoded resolution: DALI's index of the tar."""
        return index_file(resolution, shard)

    def offsets_file(self, resolution: int) -> str:
        """Of an encoded resolution: int64 [N, 2], offset and length of each image's bytes in its tar."""
        return offsets_file(resolution)

    def files_of(self, resolution: int) -> list[str]:
        """All files of one resolution, in order.

        Raises: ArgumentError if the set does not have it.
        """
        if resolution not in self.resolutions:
            may_be = f"{self.path} holds {', '.join(map(str, self.resolutions))}"
            raise ArgumentError("--resolution", resolution, may_be)
        numbers = range(len(self.shards))
        if resolution in self.cached:
            return [cache_file(resolution, shard) for shard in numbers]
        tars = [name for shard in numbers for name in (tar_file(resolution, shard), index_file(resolution, shard))]
        return [*tars, offsets_file(resolution)]

    @property
    def tables(self) -> list[str]:
        """The files that belong to no resolution."""
        optional = [LABELS] if self.num_classes else []
        return [*optional, NAMES, SKIPPED, *([CLASSES] if CLASSES in self.files else [])]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first global index of each shard: int64 [shards]."""
        return np.array([shard.first for shard in self.shards], dtype=np.int64)

    def check(self, resolution: int, flag: str = "--data") -> None:
        """See that every file of one resolution, and the labels, are there at the size the manifest says.

        Raises: ArgumentError naming the first that is missing or has another size.
        """
        for name in [*self.files_of(resolution), *([LABELS] if self.num_classes else [])]:
            fault = self.fault(name)
            if fault:
                raise ArgumentError(flag, str(self.path), f"{name} {fault}; `fastgan data verify` lists all such files")

    def fault(self, name: str) -> str:
        """What is wrong with a file as far as its size tells, to follow its name; "" if nothing."""
        wanted = self.files[name].bytes
        try:
            found = (self.path / name).stat()
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if found.st_size < wanted:
            return f"is truncated: {found.st_size:,} of {wanted:,} bytes"
        return "" if found.st_size == wanted else f"is too long: {found.st_size:,} bytes instead of {wanted:,}"

    def labels(self) -> np.ndarray | None:
        """int64 [N], or None for a set without labels."""
        if not self.num_classes:
            return None
        labels = _load(self.path / LABELS, mmap=False)
        if labels.shape != (self.count,) or labels.dtype != np.int64:
            raise ArgumentError("--data", str(self.path), f"{LABELS} may be int64 [{self.count}]")
        return labels

    def names(self) -> Iterator[str]:
        """The source name of each image, in order, read line by line."""
        with (self.path / NAMES).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def classes(self) -> list[str] | None:
        """The class names by label, if the source had any."""
        return json.loads((self.path / CLASSES).read_text()) if CLASSES in self.files else None


class Level:
    """The images of one resolution, one by one; the file sizes are checked when it is made. Safe in threads.

    Raises: ArgumentError as `Manifest.check` does.
    """

    def __init__(self, manifest: Manifest, resolution: int, flag: str = "--data") -> None:
        manifest.check(resolution, flag)
        self.manifest = manifest
        self.resolution = resolution
        self.cached = resolution in manifest.cached
        self._arrays: dict[int, np.ndarray] = {}
        self._offsets: np.ndarray | None = None
        if not self.cached:
            self._offsets = _load(manifest.path / offsets_file(resolution))
            if self._offsets.shape != (manifest.count, 2) or self._offsets.dtype != np.int64:
                may_be = f"{offsets_file(resolution)} may be int64 [{manifest.count}, 2]"
                raise ArgumentError(flag, str(manifest.path), may_be)

    def encoded(self, index: int) -> bytes:
        """The file of one image, JPEG, PNG or WebP. Only for a resolution that is not cached."""
        assert self._offsets is not None, f"{self.resolution} px is cached"
        offset, length = map(int, self._offsets[index])
        shard = bisect.bisect_right(self.manifest.starts, index) - 1
        with (self.manifest.path / tar_file(self.resolution, shard)).open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def pixels(self, index: int) -> np.ndarray:
        """One image: uint8 [C, resolution, resolution]."""
        if not self.cached:
            from PIL import Image

            with Image.open(io.BytesIO(self.encoded(index))) as image:
                # WebP has no grey: a grey image comes back as three equal planes.
                pixels = np.array(image.convert("L" if self.manifest.channels == 1 else "RGB"))
            return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        shard = bisect.bisect_right(self.manifest.starts, index) - 1
        if shard not in self._arrays:
            name = cache_file(self.resolution, shard)
            self._arrays[shard] = _load(self.manifest.path / name)
        return np.array(self._arrays[shard][index - self.manifest.shards[shard].first])


def cache_file(resolution: int, shard: int) -> str:
    return f"cache/{resolution:04}/{shard:05}.npy"


def tar_file(resolution: int, shard: int) -> str:
    return f"encoded/{resolution:04}/{shard:05}.tar"


def index_file(resolution: int, shard: int) -> str:
    return f"encoded/{resolution:04}/{shard:05}.idx"


def offsets_file(resolution: int) -> str:
    return f"encoded/{resolution:04}/offsets.npy"


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a folder with a manifest of ours, whole or damaged."""
    try:
        return f'"format": "{FORMAT}"'.encode() in (Path(path) / MANIFEST).read_bytes()
    except OSError:
        return False


def read_manifest(path: str | Path, flag: str = "--data") -> Manifest:
    """Open a prepared set: reads one file, whatever the number of images. `flag` names the argument in errors.

    Raises: ArgumentError if there is no manifest, it is of another format or schema, or it contradicts itself.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ArgumentError(flag, str(path), f"it may be a prepared set; {file} is missing") from None
    except OSError as error:
        raise ArgumentError(flag, str(path), f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ArgumentError(flag, str(path), f"{file} is damaged ({error}); prepare the set anew") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArgumentError(flag, str(path), f"{file} is not of the format {FORMAT}")
    if content.get("schema") != SCHEMA:
        raise ArgumentError(flag, str(path), f"{file} has schema {content.get('schema')}; this version reads {SCHEMA}")
    try:
        manifest = _parse(path, content)
        fault = _fault(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ArgumentError(flag, str(path), f"{file} is damaged ({fault}); prepare the set anew")
    return manifest


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all: what makes a folder a prepared set."""
    content: dict[str, Any] = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    del content["path"]
    content |= {"format": FORMAT, "schema": SCHEMA}
    content["shards"] = [asdict(shard) for shard in manifest.shards]
    content["files"] = {name: asdict(one) for name, one in manifest.files.items()}
    write_whole(manifest.path / MANIFEST, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def write_whole(file: Path, content: bytes) -> File:
    """Write a file so that its name never stands for half of it; flushed to the disk before it gets the name."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    return File(len(content), hashlib.sha256(content).hexdigest())


def fingerprint(files: dict[str, File], settings: dict[str, Any]) -> str:
    """16 hex digits that change with any file or setting."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(files):
        digest.update(f"\0{name}\0{files[name].sha256}".encode())
    return digest.hexdigest()[:16]


def _parse(path: Path, content: dict[str, Any]) -> Manifest:
    return Manifest(
        path=path,
        version=str(content["version"]),
        count=int(content["count"]),
        channels=int(content["channels"]),
        resolution=int(content["resolution"]),
        resolutions=tuple(int(r) for r in content["resolutions"]),
        cached=tuple(int(r) for r in content["cached"]),
        encoding=str(content["encoding"]),
        num_classes=int(content["num_classes"]),
        fingerprint=str(content["fingerprint"]),
        settings=dict(content["settings"]),
        source=dict(content["source"]),
        skipped=int(content["skipped"]),
        shards=tuple(Shard(int(one["first"]), int(one["count"])) for one in content["shards"]),
        files={name: File(int(one["bytes"]), str(one["sha256"])) for name, one in content["files"].items()},
    )


def _fault(manifest: Manifest) -> str:
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
    wanted = {name for resolution in resolutions for name in manifest.files_of(resolution)} | set(manifest.tables)
    wrong = sorted(wanted ^ manifest.files.keys())
    return f"{wrong[0]} is {'not listed' if wrong[0] in wanted else 'no file of such a set'}" if wrong else ""


def _load(file: Path, mmap: bool = True) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArgumentError("--data", str(file), f"it may be a whole .npy file ({error})") from error
