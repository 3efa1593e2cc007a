"""Writing the files of one shard of a prepared set, image by image: memory does not grow with the shard."""

from __future__ import annotations

import io
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastgan.data.images import channels_last, pyramid
from fastgan.data.preparation.output import OutputFormat
from fastgan.data.prepared.manifest import SUFFIXES, cache_file, index_file, tar_file
from fastgan.utils.files import AtomicFile, FileRecord, write_atomic

_BLOCK = 512  # bytes; the size of a tar is a multiple


class TarWriter(AtomicFile):
    """Writes a webdataset tar of numbered images, without times and owners, and makes DALI's index of it."""

    def __init__(self, file: Path, suffix: str) -> None:
        super().__init__(file)
        self._suffix = suffix
        self._lines: list[str] = []

    def add(self, number: int, image: bytes, label: int | None) -> None:
        """Append an image file under its global index."""
        parts = [self._member(f"{number:09}.{self._suffix}", self._suffix, image)]
        if label is not None:
            parts.append(self._member(f"{number:09}.cls", "cls", str(label).encode()))
        self._lines.append(" ".join(parts))

    def commit(self) -> FileRecord:
        self.write(bytes(2 * _BLOCK))
        return super().commit()

    def index(self) -> bytes:
        """Return the content of the index, in DALI's layout of version 1.2."""
        return ("\n".join([f"v1.2 {len(self._lines)}", *self._lines]) + "\n").encode()

    def _member(self, name: str, kind: str, content: bytes) -> str:
        """Write one member and return its entry of the index."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.bytes
        self.write(content + bytes(-len(content) % _BLOCK))
        return f"{kind} {offset} {len(content)} {name}"


def renumber(folder: Path, shard: int, resolution: int, first: int, suffix: str) -> dict[str, FileRecord]:
    """Rename the members of a shard's tar, counting from global index `first`. Sizes and offsets do not change."""
    file, index = folder / tar_file(resolution, shard), folder / index_file(resolution, shard)
    with TarWriter(file, suffix) as out, file.open("rb") as stream:
        for number, line in enumerate(index.read_text().splitlines()[1:], first):
            fields = line.split(" ")
            contents = []
            for offset, length in zip(fields[1::4], fields[2::4], strict=True):
                stream.seek(int(offset))
                contents.append(stream.read(int(length)))
            out.add(number, contents[0], int(contents[1]) if len(contents) > 1 else None)
        record = out.commit()
    return {tar_file(resolution, shard): record, index_file(resolution, shard): write_atomic(index, out.index())}


def read_index(content: bytes) -> np.ndarray:
    """Return offset and length of each image of a tar, from its index: int64 [n, 2]."""
    lines = content.decode().splitlines()[1:]
    return np.array([line.split(" ")[1:3] for line in lines], dtype=np.int64).reshape(-1, 2)


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file in C order, so that the rest can be written in pieces. dtype: as in "<i8"."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def encode(pixels: np.ndarray, output: OutputFormat) -> bytes:
    """Encode uint8 [C, r, r], C 1 or 3, as an image file."""
    from PIL import Image

    options: dict[str, dict[str, Any]] = {
        # Without chroma subsampling, whose blocks a GAN would learn.
        "jpeg": {"quality": output.quality, "subsampling": 0},
        "png": {"compress_level": 6},
        "webp": {"lossless": True, "quality": 50, "method": 4},
    }
    file = io.BytesIO()
    Image.fromarray(channels_last(pixels)).save(file, format=output.encoding.upper(), **options[output.encoding])
    return file.getvalue()


class ShardWriter:
    """Writes all files of one shard: `add` each image in order, then `commit`.

    As a context manager it discards what was not committed.

    Args:
        folder: of the set.
        shard: its number.
        first: global index of its first image.
        count: number of images that will be added.
        output: what is written for each image.
    """

    def __init__(self, folder: Path, shard: int, first: int, count: int, output: OutputFormat) -> None:
        self._folder, self._shard, self._first, self._count, self._output = folder, shard, first, count, output
        self._files: dict[int, AtomicFile] = {}
        self._added = 0
        with ExitStack() as stack:
            for r in output.resolutions:
                name = cache_file(r, shard) if r in output.cached else tar_file(r, shard)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if r in output.cached:
                    self._files[r] = stack.enter_context(AtomicFile(folder / name))
                    self._files[r].write(npy_header("|u1", (count, output.channels, r, r)))
                else:
                    self._files[r] = stack.enter_context(TarWriter(folder / name, SUFFIXES[output.encoding]))
            self._stack = stack.pop_all()

    def add(self, pixels: np.ndarray, label: int | None) -> None:
        """Append an image at the target resolution: uint8 [C, R, R]."""
        side = self._output.resolutions[-1]
        assert pixels.shape == (self._output.channels, side, side), pixels.shape
        for r, image in pyramid(pixels, self._output.resolutions).items():
            file = self._files[r]
            if isinstance(file, TarWriter):
                file.add(self._first + self._added, encode(image, self._output), label)
            else:
                file.write(np.ascontiguousarray(image).data.cast("B"))
        self._added += 1

    def commit(self) -> dict[str, FileRecord]:
        """Finish all files; return their records by name below the set's folder."""
        assert self._added == self._count, f"{self._added} of {self._count} images"
        records = {}
        for r, file in self._files.items():
            if isinstance(file, TarWriter):
                records[tar_file(r, self._shard)] = file.commit()
                index = index_file(r, self._shard)
                records[index] = write_atomic(self._folder / index, file.index())
            else:
                records[cache_file(r, self._shard)] = file.commit()
        return records

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
