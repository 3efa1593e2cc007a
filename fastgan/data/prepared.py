"""A prepared set on disk: what `fastgan prepare` writes and training reads. docs/data.md describes every file.

Its manifest is written last, so a folder with a manifest is whole. Nothing in it is unpickled.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.images import first_line, undecodable
from fastgan.data.source import Encoded, Source
from fastgan.errors import ArgumentError
from fastgan.utils.files import File, write_atomic

FORMAT = "fastgan-prepared"
SCHEMA = 1
MANIFEST = "manifest.json"
UNFINISHED = ".preparing"  # holds what `prepare` must know to go on
LABELS, NAMES, CLASSES, SKIPPED = "labels.npy", "names.jsonl", "classes.json", "skipped.txt"
# np.load reads a header with `ast`, which Python 3.11 cannot in two threads at once (SystemError: AST constructor ...).
_LOADING = threading.Lock()
# Encoding -> what its members in a tar end with. DALI and webdataset know all three.
SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of images that share files: global indices [first, first + count)."""

    first: int
    count: int


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
            self._check(name, flag)

    def _check(self, name: str, flag: str) -> None:
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

    def labels(self, flag: str = "--data") -> np.ndarray | None:
        """int64 [N], or None for a set without labels."""
        if not self.num_classes:
            return None
        labels = _load(self.path / LABELS, mmap=False, flag=flag)
        if labels.shape != (self.count,) or labels.dtype != np.int64:
            raise ArgumentError(flag, str(self.path), f"{LABELS} may be int64 [{self.count}]")
        return labels

    def names(self, flag: str = "--data") -> Iterator[str]:
        """The source name of each image, in order, read line by line."""
        self._check(NAMES, flag)
        with (self.path / NAMES).open("rb") as lines:
            for line in lines:
                yield self._parsed(line, NAMES, flag)

    def classes(self, flag: str = "--data") -> list[str] | None:
        """The class names by label, if the source had any."""
        if CLASSES not in self.files:
            return None
        self._check(CLASSES, flag)
        return self._parsed((self.path / CLASSES).read_bytes(), CLASSES, flag)

    def _parsed(self, text: bytes, name: str, flag: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            may_be = f"{name} is damaged ({error}); `fastgan data verify` lists all such files"
            raise ArgumentError(flag, str(self.path), may_be) from None


class Level:
    """The images of one resolution, one by one; the file sizes are checked when it is made. Safe in threads.

    Raises: ArgumentError as `Manifest.check` does.
    """

    def __init__(self, manifest: Manifest, resolution: int, flag: str = "--data") -> None:
        manifest.check(resolution, flag)
        self.manifest = manifest
        self.resolution = resolution
        self._flag = flag
        self.cached = resolution in manifest.cached
        self._arrays: dict[int, np.ndarray] = {}
        self._offsets: np.ndarray | None = None
        if not self.cached:
            self._offsets = _load(manifest.path / offsets_file(resolution), flag=flag)
            if self._offsets.shape != (manifest.count, 2) or self._offsets.dtype != np.int64:
                may_be = f"{offsets_file(resolution)} may be int64 [{manifest.count}, 2]"
                raise ArgumentError(flag, str(manifest.path), may_be)

    def encoded(self, index: int) -> bytes:
        """The file of one image, JPEG, PNG or WebP. Only for a resolution that is not cached."""
        assert self._offsets is not None, f"{self.resolution} px is cached"
        offset, length = map(int, self._offsets[index])
        shard = self._shard(index)
        with (self.manifest.path / tar_file(self.resolution, shard)).open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def pixels(self, index: int) -> np.ndarray:
        """One image: uint8 [C, resolution, resolution]."""
        if not self.cached:
            from PIL import Image

            # WebP has no gray: a gray image comes back as three equal planes.
            mode = "L" if self.manifest.channels == 1 else "RGB"
            try:
                with Image.open(io.BytesIO(self.encoded(index))) as image:
                    pixels = np.array(image.convert(mode))
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
                reason = f"the image cannot be decoded ({undecodable(error)})"
                may_be = f"{reason}; `fastgan data verify` lists what is damaged"
                raise ArgumentError(self._flag, self.name(index), may_be) from error
            return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        shard = self._shard(index)
        return np.array(self.array(shard)[index - self.manifest.shards[shard].first])

    def array(self, shard: int) -> np.ndarray:
        """One shard, memory-mapped: uint8 [n, C, resolution, resolution]. Only for a resolution that is cached.

        Raises: ArgumentError naming the file, if it holds something else.
        """
        if shard not in self._arrays:
            name = cache_file(self.resolution, shard)
            array = _load(self.manifest.path / name, flag=self._flag)
            shape = (self.manifest.shards[shard].count, self.manifest.channels, self.resolution, self.resolution)
            if array.shape != shape or array.dtype != np.uint8:
                may_be = f"{name} holds {array.dtype} {list(array.shape)}; it may be uint8 {list(shape)}"
                raise ArgumentError(self._flag, str(self.manifest.path), may_be)
            self._arrays[shard] = array
        return self._arrays[shard]

    def name(self, index: int) -> str:
        """What to call an image that cannot be decoded."""
        file = tar_file(self.resolution, self._shard(index))
        return f"{self.manifest.path / file}, member {index:09}.{SUFFIXES[self.manifest.encoding]}"

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self.manifest.starts, index) - 1


class PreparedSource(Source):
    """What `fastgan prepare` wrote: every resolution lies there, decoded up to some size and encoded above.

    Raises: ArgumentError naming a file that is missing or has another size, at any resolution up to the target.
    """

    def __init__(self, manifest: Manifest, resolution: int, channels: int | None = None) -> None:
        if channels not in (None, manifest.channels):
            may_be = f"{manifest.path} has {manifest.channels}; it may be left out"
            raise ArgumentError("--channels", channels, may_be)
        if resolution > manifest.resolution:
            may_be = f"{manifest.path} was prepared up to {manifest.resolution} px"
            raise ArgumentError("--resolution", resolution, may_be)
        self.manifest = manifest
        self._levels = {at: Level(manifest, at) for at in manifest.resolutions if at <= resolution}
        super().__init__(
            "prepared",
            resolution=resolution,
            channels=manifest.channels,
            labels=manifest.labels(),
            num_classes=manifest.num_classes,
            fingerprint=manifest.fingerprint,
            path=manifest.path,
        )

    def __len__(self) -> int:
        return self.manifest.count

    def _target(self, index: int) -> np.ndarray:
        return self._levels[self.resolution].pixels(index)

    def read(self, index: int, resolution: int) -> np.ndarray:
        """One image as it was prepared: nothing is resized. See `Source.read`."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        self.check_resolution(resolution)
        return self._levels[resolution].pixels(index)

    def arrays(self, resolution: int) -> list[np.ndarray] | None:
        level = self._levels[resolution]
        return [level.array(shard) for shard in range(len(self.manifest.shards))] if level.cached else None

    def encoded(self, resolution: int) -> Encoded | None:
        """Of the lowest resolution, from the one asked for, that lies encoded."""
        side = next((at for at in self.manifest.resolutions if at >= max(resolution, self._first_encoded)), None)
        if side is None:
            return None
        if side not in self._levels:
            self._levels[side] = Level(self.manifest, side)
        level = self._levels[side]
        encoding = self.manifest.encoding.upper()
        mode = "L" if self.channels == 1 and encoding != "WEBP" else "RGB"  # WebP has no gray
        kinds = {(encoding, mode, False): level.name(0)}
        return Encoded(level.encoded, level.name, side, kinds, exact=True)

    @property
    def _first_encoded(self) -> int:
        return 2 * max(self.manifest.cached, default=2)


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


def begun(path: Path) -> str:
    """What to say of a set that `prepare` has not finished, or ""."""
    if not (path / UNFINISHED).is_dir():
        return ""
    return "it is a prepared set that is not finished; the `fastgan prepare` that began it goes on"


def read_manifest(path: str | Path, flag: str = "--data") -> Manifest:
    """Open a prepared set: reads one file, whatever the number of images. `flag` names the argument in errors.

    Raises: ArgumentError if there is no manifest, it is of another format or schema, or it contradicts itself.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        may_be = begun(path) or f"must be a prepared set; {file} is missing"
        raise ArgumentError(flag, str(path), may_be) from None
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
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
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
    write_atomic(manifest.path / MANIFEST, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


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


def _load(file: Path, mmap: bool = True, flag: str = "--data") -> np.ndarray:
    try:
        with _LOADING:
            array = np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
        reason = "it is a .npz"
    except Exception as error:  # a damaged header goes through Python's own tokenizer, whose errors are many
        reason = first_line(error)
    may_be = f"must be a whole .npy file ({reason}); `fastgan data verify` lists all that are not"
    raise ArgumentError(flag, str(file), may_be)
