"""Originals inside archives: a zip, or tar files as webdataset makes them. Read in place, nothing is unpacked."""

from __future__ import annotations

import bz2
import functools
import glob
import io
import json
import lzma
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from fastgan.data.images import first_line
from fastgan.data.preparation.originals import Files, Item, first_folder, hidden
from fastgan.data.walk import sorted_rows
from fastgan.errors import ArgumentError

# Layouts from PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14
_KEYS = ("label", "cls", "class")  # of a sample's .json, in the order in which they are looked for


class Zip(Files):
    """The image files of a zip, sorted by name as if it were unpacked; the directory is read piece by piece."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def items(self) -> Iterator[Item]:
        wrapper = common_folder(row[0] for row in self._rows())
        for name, size, crc, at, packed, method, flags in sorted_rows(self._rows()):
            reason = ""
            if flags & 1:
                reason = "encrypted"
            elif method not in (_STORED, _DEFLATED, _BZIP2, _LZMA):
                reason = f"packed with method {method}, which is not supported"
            label = first_folder(name[len(wrapper) :])
            yield Item(name, size, crc, (at, packed, method), label, reason)

    def open(self, item: Item) -> BinaryIO:
        at, packed, method = item.where
        with self.path.open("rb") as stream:
            stream.seek(at)
            head = stream.read(_LOCAL.size)
            if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
                raise ValueError("the archive is damaged here: no header")
            *_, name_length, extra_length = _LOCAL.unpack(head)
            stream.seek(name_length + extra_length, os.SEEK_CUR)
            content = _unpack(stream.read(packed), method, item.size)
        if zlib.crc32(content) != item.stamp:
            raise ValueError("the archive is damaged here: wrong checksum")
        return io.BytesIO(content)

    def _rows(self) -> Iterator[tuple[str, int, int, int, int, int, int]]:
        """Name, size, checksum, place, packed size, method and flags of each file, in the archive's order."""
        with self.path.open("rb") as stream:
            start, count, shift = self._directory(stream)
            stream.seek(start)
            for number in range(count):
                head = stream.read(_ENTRY.size)
                if len(head) < _ENTRY.size or not head.startswith(b"PK\1\2"):
                    raise self._broken(f"its list of files ends after {number:,} of {count:,}")
                fields = _ENTRY.unpack(head)
                flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
                raw, extra = stream.read(fields[10]), stream.read(fields[11])
                stream.seek(fields[12], os.SEEK_CUR)
                size, packed, at = _wide(extra, [size, packed, fields[16]])
                name = raw.decode("utf-8" if flags & 0x800 else "cp437", errors="surrogateescape")
                if not name.endswith("/") and not hidden(name):
                    yield name, size, crc, at + shift, packed, method, flags

    def _directory(self, stream: BinaryIO) -> tuple[int, int, int]:
        """Where the list of files starts, how many there are, and how far all places are shifted."""
        end = stream.seek(0, os.SEEK_END)
        start = max(0, end - _END.size - 0xFFFF)
        stream.seek(start)
        tail = stream.read()
        found = tail.rfind(b"PK\5\6")
        if found < 0 or len(tail) - found < _END.size:
            raise self._broken("it ends without the list of its files")
        _, disk, _, _, count, length, offset, _ = _END.unpack_from(tail, found)
        at = start + found
        if found >= _LOCATOR.size and tail[found - _LOCATOR.size :].startswith(b"PK\6\7"):
            _, disk, at, _ = _LOCATOR.unpack_from(tail, found - _LOCATOR.size)
            stream.seek(at)
            head = stream.read(_END64.size)
            if len(head) < _END64.size or not head.startswith(b"PK\6\6"):
                raise self._broken("the list of its files is not where it should be")
            *_, count, length, offset = _END64.unpack(head)
        if disk not in (0, 0xFFFF):
            raise self._broken("it is one of several parts; join them first")
        # Something may stand before the archive, as in one that unpacks itself: places then count from its start.
        shift = at - length - offset
        if shift < 0:
            raise self._broken("the list of its files is not where it should be")
        return offset + shift, count, shift

    def _broken(self, what: str) -> ArgumentError:
        return ArgumentError("SRC", str(self.path), f"must be a whole zip file; {what}")


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Size, packed size and place, from the extra field where they do not fit 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(numbers, value) if value == 0xFFFFFFFF else value for value in values]
        at += 4 + length
    return values


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    """Never more than a byte beyond `size`, so that a bomb is found out and not blown up."""
    if method == _STORED:
        return packed
    if method == _DEFLATED:
        return zlib.decompressobj(-15).decompress(packed, size + 1)
    if method == _BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    # 4 bytes of version and length, then the properties of one filter.
    length = int.from_bytes(packed[2:4], "little")
    code, dictionary = packed[4], int.from_bytes(packed[5:9], "little")
    filters = [
        {"id": lzma.FILTER_LZMA1, "lc": code % 9, "lp": code // 9 % 5, "pb": code // 45, "dict_size": dictionary}
    ]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(packed[4 + length :], size + 1)


class Tar(Files):
    """The images of tar files, in the order of the files' names and then of the archive.

    A sample, in webdataset's sense, is what shares a name up to the first dot of its last part; its .cls, or a key
    of its .json, is the label of its images. Where nothing says so, a label is the first-level folder.
    """

    kind = "tar"

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path: Path = path
        self.files = files

    def items(self) -> Iterator[Item]:
        wrapper: str | None = None  # found out when it is first needed: that takes a pass of its own
        for number, file in enumerate(self.files):
            for sample in self._samples(file):
                label = self._label(file, sample)
                found = False
                for member in sample:
                    name = f"{file.name}/{member.name}" if len(self.files) > 1 else member.name
                    if suffix(member.name) not in image_suffixes():
                        continue
                    if not member.isreg():
                        found = True
                        yield Item(name, reason="a link, which is not followed in an archive")
                        continue
                    found, own = True, label
                    if own is None:
                        if wrapper is None:
                            wrapper = common_folder(one.name for each in self.files for one in self._members(each))
                        own = first_folder(member.name[len(wrapper) :])
                    yield Item(name, member.size, int(member.mtime), (number, member.offset_data), own)
                if not found:
                    yield Item(f"{file.name}/{sample[0].name}", reason="no image format Pillow knows")

    def open(self, item: Item) -> BinaryIO:
        number, at = item.where
        with self.files[number].open("rb") as stream:
            stream.seek(at)
            content = stream.read(item.size)
        if len(content) < item.size:
            raise ValueError(f"{self.files[number]} ends within it")
        return io.BytesIO(content)

    def _samples(self, file: Path) -> Iterator[list[tarfile.TarInfo]]:
        """Runs of members with one key."""
        sample: list[tarfile.TarInfo] = []
        for member in self._members(file):
            if sample and _key(sample[0].name) != _key(member.name):
                yield sample
                sample = []
            sample.append(member)
        if sample:
            yield sample

    def _members(self, file: Path) -> Iterator[tarfile.TarInfo]:
        last = "its beginning"
        try:
            with tarfile.open(file, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # which would keep every one of them
                    last = member.name = member.name.removeprefix("./")
                    if (member.isreg() or member.islnk() or member.issym()) and not hidden(member.name):
                        yield member
                # tarfile takes a damaged header for the end; the end is a block of zeros, or the file's.
                assert archive.fileobj is not None
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError("bad header")
        except tarfile.ReadError as error:
            hint = "; compressed archives are unpacked first" if _compressed(file) else ""
            raise ArgumentError("SRC", str(file), f"must be a whole tar file ({error} after {last}){hint}") from error
        except OSError as error:
            raise ArgumentError("SRC", str(file), f"must be a readable tar file ({error.strerror})") from error

    def _label(self, file: Path, sample: list[tarfile.TarInfo]) -> int | str | None:
        """What a sample says of itself: a number, or the name of a class."""
        for member in sample:
            kind = suffix(member.name)
            if kind not in ("cls", "json") or not member.isreg() or member.size > 2**20:
                continue
            with file.open("rb") as stream:
                stream.seek(member.offset_data)
                content = stream.read(member.size)
            try:
                value = json.loads(content) if kind == "json" else content.decode().strip()
                if isinstance(value, dict):
                    value = next((value[key] for key in _KEYS if key in value), None)
            except ValueError as error:
                what = f"{member.name} may hold a label ({first_line(error)})"
                raise ArgumentError("SRC", str(file), what) from error
            if value is None or value == "":
                continue
            if isinstance(value, str) and not value.isdecimal():
                return value
            number = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
            if number and len(str(value)) <= 18:  # they are stored in 64 bits
                return int(value)
            may_be = "a label may be a number from 0 of up to 18 digits, or the name of a class"
            raise ArgumentError("SRC", str(file), f"{member.name} holds {value!r:.40}; {may_be}")
        return None


def tar_files(pattern: str) -> list[Path]:
    """The tar files that a path means: itself, those in a folder, those that match `*`, `?`, `[...]` or `{a..b}`."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(one for one in path.iterdir() if one.suffix == ".tar" and not one.name.startswith("."))
    # Without * and the like a name stands for itself, there or not: a missing shard is told by name.
    found = {one for each in _braces(str(path)) for one in (glob.glob(each) if glob.has_magic(each) else [each])}
    return [Path(one) for one in sorted(found)]


def _braces(pattern: str) -> Iterator[str]:
    """`x-{000..012}.tar`, the way webdataset writes shards, to each of them."""
    head, opening, rest = pattern.partition("{")
    inner, closing, tail = rest.partition("}")
    first, dots, last = inner.partition("..")
    if not (opening and closing and dots and first.isdecimal() and last.isdecimal()):
        yield pattern
        return
    for number in range(int(first), int(last) + 1):
        yield from _braces(f"{head}{number:0{len(first)}}{tail}")


def common_folder(names: Iterable[str]) -> str:
    """The folder in which all names lie, as an archive of one folder has it, with its "/"; "" if there is none."""
    names = iter(names)
    first = first_folder(next(names, ""))
    if first is None or any(first_folder(name) != first for name in names):
        return ""
    return f"{first}/"


@functools.cache
def image_suffixes() -> set[str]:
    from PIL import Image

    return {suffix[1:] for suffix in Image.registered_extensions()}


def suffix(name: str) -> str:
    """What a name ends with, in small letters, without the dot."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _compressed(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(6)
    except OSError:
        return False
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
