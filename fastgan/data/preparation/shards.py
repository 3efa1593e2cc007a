"""Writing the files of one shard of a prepared set, image by image, so that memory does not grow with its size."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastgan.data.images import pyramid
from fastgan.data.prepared import SUFFIXES, cache_file, index_file, tar_file
from fastgan.utils.files import AtomicFile, File, array_header, write_atomic

_BLOCK = 512  # a tar is made of blocks of this size


class TarOutput:
    """A webdataset tar of numbered images, and the lines of DALI's index of it. No times, owners or random order."""

    def __init__(self, file: Path, suffix: str) -> None:
        self._out = AtomicFile(file)
        self._suffix = suffix
        self._lines: list[str] = []

    def add(self, number: int, image: bytes, label: int | None) -> None:
        parts = [self._member(f"{number:09}.{self._suffix}", self._suffix, image)]
        if label is not None:
            parts.append(self._member(f"{number:09}.cls", "cls", str(label).encode()))
        self._lines.append(" ".join(parts))

    def finish(self) -> tuple[File, bytes]:
        """The tar, and the content of its index: DALI's layout of version 1.2."""
        self._out.write(bytes(2 * _BLOCK))
        index = "\n".join([f"v1.2 {len(self._lines)}", *self._lines]) + "\n"
        return self._out.finish(), index.encode()

    def abandon(self) -> None:
        self._out.abandon()

    def _member(self, name: str, kind: str, content: bytes) -> str:
        """Write one member; its entry in the index."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._out.write(header.tobuf(tarfile.USTAR_FORMAT))
        at = self._out.bytes
        self._out.write(content + bytes(-len(content) % _BLOCK))
        return f"{kind} {at} {len(content)} {name}"


def renumber(folder: Path, shard: int, resolution: int, first: int, suffix: str) -> dict[str, File]:
    """Name the members of a shard's tar anew, from global index `first`; sizes and places stay as they are."""
    file, index = folder / tar_file(resolution, shard), folder / index_file(resolution, shard)
    out = TarOutput(file, suffix)
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(index.read_text().splitlines()[1:], first):
                fields = line.split(" ")
                contents = []
                for at, length in zip(fields[1::4], fields[2::4], strict=True):
                    stream.seek(int(at))
                    contents.append(stream.read(int(length)))
                out.add(number, contents[0], int(contents[1]) if len(contents) > 1 else None)
        whole, lines = out.finish()
    finally:
        out.abandon()
    return {tar_file(resolution, shard): whole, index_file(resolution, shard): write_atomic(index, lines)}


def read_index(content: bytes) -> np.ndarray:
    """Offset and length of each image of a tar, from its index: int64 [n, 2]."""
    lines = content.decode().splitlines()[1:]
    return np.array([line.split(" ")[1:3] for line in lines], dtype=np.int64).reshape(-1, 2)


def encode(pixels: np.ndarray, encoding: str, quality: int) -> bytes:
    """uint8 [C, r, r], C 1 or 3, as one image file."""
    from PIL import Image

    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    options: dict[str, dict[str, Any]] = {
        # No chroma subsampling: a GAN would learn the blocks it leaves.
        "jpeg": {"quality": quality, "subsampling": 0},
        "png": {"compress_level": 6},
        "webp": {"lossless": True, "quality": 50, "method": 4},
    }
    file = io.BytesIO()
    image.save(file, format=encoding.upper(), **options[encoding])
    return file.getvalue()


class ShardWriter:
    """All files of one shard. `add` each image in order, then `finish`; leaving early leaves nothing behind.

    folder: of the set. first, count: global index of the first image, and how many will come. resolutions: from
    4 to the target; those in `cached` are stored as arrays, the others as image files.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        first: int,
        count: int,
        *,
        channels: int,
        resolutions: tuple[int, ...],
        cached: tuple[int, ...],
        encoding: str,
        quality: int,
    ) -> None:
        self._folder, self._shard = folder, shard
        self._first, self._count, self._channels = first, count, channels
        self._resolutions, self._encoding, self._quality = resolutions, encoding, quality
        self._arrays: dict[int, AtomicFile] = {}
        self._tars: dict[int, TarOutput] = {}
        self._added = 0
        try:
            for r in resolutions:
                name = cache_file(r, shard) if r in cached else tar_file(r, shard)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if r in cached:
                    self._arrays[r] = AtomicFile(folder / name)
                    self._arrays[r].write(array_header("|u1", (count, channels, r, r)))
                else:
                    self._tars[r] = TarOutput(folder / name, SUFFIXES[encoding])
        except BaseException:
            self.abandon()
            raise

    def add(self, pixels: np.ndarray, label: int | None) -> None:
        """The next image at the target resolution: uint8 [C, R, R]."""
        assert pixels.shape == (self._channels, self._resolutions[-1], self._resolutions[-1]), pixels.shape
        for r, image in pyramid(pixels, self._resolutions).items():
            if r in self._arrays:
                self._arrays[r].write(np.ascontiguousarray(image).data.cast("B"))
            else:
                data = encode(image, self._encoding, self._quality)
                self._tars[r].add(self._first + self._added, data, label)
        self._added += 1

    def finish(self) -> dict[str, File]:
        """The shard's files, by name below the set's folder."""
        assert self._added == self._count, f"{self._added} of {self._count} images"
        files = {cache_file(r, self._shard): out.finish() for r, out in self._arrays.items()}
        for r, tar in self._tars.items():
            files[tar_file(r, self._shard)], index = tar.finish()
            name = index_file(r, self._shard)
            files[name] = write_atomic(self._folder / name, index)
        return files

    def abandon(self) -> None:
        for array in self._arrays.values():
            array.abandon()
        for tar in self._tars.values():
            tar.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()
