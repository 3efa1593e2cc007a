"""Input collections in archives: a zip, or tar files as webdataset writes them. Nothing is extracted to the disk."""

from __future__ import annotations

import bz2
import glob
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastgan.data.faults import is_machine_fault, machine_error, raise_if_machine
from fastgan.data.folder_labels import DATASET_JSON, label_of, layout, parse_dataset_json, require_bounded
from fastgan.data.images import UNREAD, first_line, is_image_name, require_size, suffix
from fastgan.data.preparation.collection import FileCollection, InputImage, is_hidden, unpacked_name
from fastgan.data.source_types import MAX_CLASSES
from fastgan.errors import ArgumentError
from fastgan.utils.stored_values import MALFORMED

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_PIECE = 2**12  # bytes read from a file in a zip at a time
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, lengths of name and extra field (APPNOTE 6.3.10, 4.3.7)
_LABEL_KEYS = ("label", "cls", "class")  # of a sample's .json, in order of precedence


class ZipCollection(FileCollection):
    """The image files of a zip, sorted by name as if it were extracted.

    The list of files takes about 660 bytes a file (630 MB for a million), in the process that lists them.
    """

    kind = "zip"

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def images(self) -> Iterator[InputImage]:
        members = self._members()
        wrapper, storage = layout(members, unwrap=DATASET_JSON not in members)
        table = members.get(wrapper + DATASET_JSON)
        stored = None if table is None else self._stored_labels(table)
        storage = storage or table is not None
        for name, member in members.items():
            inner = name[len(wrapper) :]
            if inner == DATASET_JSON:
                continue
            problem = too_large(member.file_size)
            if member.flag_bits & 1:
                problem = "encrypted"
            elif member.compress_type not in _METHODS:
                problem = f"compression method {member.compress_type} is not supported"
            label = label_of(inner, stored, storage)
            yield InputImage(name, member.file_size, member.CRC, _location(member), label, problem)

    def _stored_labels(self, table: zipfile.ZipInfo) -> dict[str, int] | None:
        """The labels of a dataset.json."""
        place = f"{self.path}/{table.filename}"
        require_bounded(table.file_size, "SRC", place)
        image = InputImage(table.filename, table.file_size, table.CRC, _location(table))
        try:
            with self.open(image) as stream:
                content = stream.read()
        except ValueError as error:
            raise ArgumentError("SRC", place, str(error)) from error
        except (OSError, MemoryError) as error:
            raise machine_error("SRC", place, error) from error
        return parse_dataset_json(content, "SRC", place)

    def _members(self) -> dict[str, zipfile.ZipInfo]:
        """The files that unpacking would leave, by name, sorted: of files with one name the last."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = {unpacked_name(one.filename): one for one in archive.infolist() if not _is_folder(one)}
            if any(member.header_offset < 0 for member in members.values()):
                raise zipfile.BadZipFile("Bad offset")
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            if error.__context__ is not None:  # zipfile makes "File is not a zip file" of any OSError
                raise_if_machine(error.__context__, "SRC", str(self.path))
            raise ArgumentError("SRC", str(self.path), f"must be a whole zip file; {first_line(error)}") from error
        return {name: members[name] for name in sorted(members) if name and not is_hidden(name)}

    def open(self, image: InputImage) -> BinaryIO:
        """Read one file. Memory is bounded by its listed size: the rest of a decompression bomb is not read.

        `ZipFile.open` is not used, because opening a ZipFile lists all its files, in every worker process.
        """
        member = zipfile.ZipInfo(image.name)
        member.file_size, member.CRC = image.size, image.stamp
        offset, member.compress_size, member.compress_type = image.location
        try:
            with self.path.open("rb") as stream:
                stream.seek(offset)
                signature, name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
                if signature != b"PK\3\4":
                    raise zipfile.BadZipFile("no header")
                stream.seek(name_length + extra_length, os.SEEK_CUR)
                if member.compress_type == zipfile.ZIP_BZIP2:
                    # zipfile would decompress all of it at once: 4 kB may become 4 GB.
                    content = bz2.BZ2Decompressor().decompress(stream.read(member.compress_size), image.size + 1)
                    if zlib.crc32(content) != image.stamp:
                        raise zipfile.BadZipFile("Bad CRC-32")
                    return io.BytesIO(content)
                out = io.BytesIO()
                with zipfile.ZipExtFile(stream, "r", member) as packed:
                    # In pieces, which bounds LZMA: zipfile decompresses a whole piece, and 4 kB become 30 MB at most.
                    while piece := packed.read(_PIECE):
                        out.write(piece)
                out.seek(0)
                return out
        except Exception as error:  # each decompressor has its own
            if is_machine_fault(error):
                raise
            raise ValueError(f"the archive is damaged here: {first_line(error)}") from error


def _location(member: zipfile.ZipInfo) -> tuple[int, int, int]:
    return member.header_offset, member.compress_size, member.compress_type


class TarCollection(FileCollection):
    """The images of tar files, in the order of the files' names and then of the archive.

    A sample of webdataset is what shares a name up to the first dot of its last part. Its .cls, or a key of its .json,
    is the label of its images; without either, the label is the first-level folder. Of members with one name in a tar
    the last one counts, as unpacking would leave it.
    """

    kind = "tar"

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path: Path = path
        self.files = files

    def images(self) -> Iterator[InputImage]:
        read: tuple[str, bool, dict[str, int] | None] | None = None  # when it is needed: it takes a pass over all files
        for number, file in enumerate(self.files):
            for sample in self._samples(file):
                sample_label = self._label(file, sample)
                has_image = False
                for member in sample:
                    name = f"{file.name}/{member.name}" if len(self.files) > 1 else member.name
                    if not is_image_name(member.name):
                        continue
                    has_image = True
                    if not member.isreg():
                        yield InputImage(name, problem="a link, which is not followed in an archive")
                        continue
                    label = sample_label
                    if label is None:
                        read = read or self._folders()
                        wrapper, storage, stored = read
                        label = label_of(member.name[len(wrapper) :], stored, storage)
                    stamp, location = int(member.mtime), (number, member.offset_data)
                    yield InputImage(name, member.size, stamp, location, label, too_large(member.size))
                if not has_image and not _is_table(sample[0].name):
                    yield InputImage(f"{file.name}/{sample[0].name}", problem=UNREAD)

    def _folders(self) -> tuple[str, bool, dict[str, int] | None]:
        """The folder that holds everything, whether those below it are no classes, and the labels of a dataset.json."""
        tables: dict[str, tuple[Path, tarfile.TarInfo]] = {}

        def names() -> Iterator[str]:
            for file in self.files:
                for member in self._members(file):
                    if _is_table(member.name) and member.isreg():
                        tables[member.name] = file, member
                    yield member.name

        wrapper, storage = layout(names(), unwrap=True)
        if DATASET_JSON in tables:
            wrapper = ""
        if wrapper + DATASET_JSON not in tables:
            return wrapper, storage, None
        file, member = tables[wrapper + DATASET_JSON]
        place = f"{file}/{member.name}"
        require_bounded(member.size, "SRC", place)
        return wrapper, True, parse_dataset_json(self._content(file, member), "SRC", place)

    def _content(self, file: Path, member: tarfile.TarInfo) -> bytes:
        try:
            with file.open("rb") as stream:
                stream.seek(member.offset_data)
                return stream.read(member.size)
        except (OSError, MemoryError) as error:
            raise machine_error("SRC", f"{file}/{member.name}", error) from error

    def open(self, image: InputImage) -> BinaryIO:
        number, offset = image.location
        with self.files[number].open("rb") as stream:
            stream.seek(offset)
            content = stream.read(image.size)
        if len(content) < image.size:
            raise ValueError(f"{self.files[number]} is truncated here")
        return io.BytesIO(content)

    def _samples(self, file: Path) -> Iterator[list[tarfile.TarInfo]]:
        """Runs of members with one key."""
        sample: list[tarfile.TarInfo] = []
        replaced = self._replaced(file)
        for member in self._members(file):
            if member.offset in replaced:
                continue
            if sample and _sample_key(sample[0].name) != _sample_key(member.name):
                yield sample
                sample = []
            sample.append(member)
        if sample:
            yield sample

    def _replaced(self, file: Path) -> set[int]:
        """Offsets of members that a later one of the same name replaces. 8 bytes a member: a tar may hold millions."""
        hashes = array("q", (hash(member.name) for member in self._members(file)))
        values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
        repeated = set(values[counts > 1].tolist())
        if not repeated:
            return set()
        offsets: dict[str, int] = {}
        replaced = set()
        for member in self._members(file):
            if hash(member.name) in repeated:
                replaced.add(offsets.get(member.name, member.offset))
                offsets[member.name] = member.offset
        return replaced - set(offsets.values())

    def _members(self, file: Path) -> Iterator[tarfile.TarInfo]:
        last = "its start"
        try:
            with tarfile.open(file, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                    last = member.name = unpacked_name(member.name)
                    if (member.isreg() or member.islnk() or member.issym()) and last and not is_hidden(last):
                        yield member
                # tarfile takes a damaged header for the end, which is a block of zeros, or the end of the file.
                assert archive.fileobj is not None
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError("bad header")
        except tarfile.ReadError as error:
            hint = "; decompress it first" if _is_compressed(file) else ""
            raise ArgumentError("SRC", str(file), f"must be a whole tar file; {error} after {last}{hint}") from error
        except (OSError, MemoryError) as error:
            raise_if_machine(error, "SRC", str(file))
            assert isinstance(error, OSError)
            raise ArgumentError("SRC", str(file), f"must be a readable tar file; {error.strerror}") from error

    def _label(self, file: Path, sample: list[tarfile.TarInfo]) -> int | str | None:
        """The label in the .cls or .json of a sample: a number, or the name of a class."""
        for member in sample:
            kind = suffix(member.name)
            if kind not in ("cls", "json") or not member.isreg() or member.size > 2**20 or _is_table(member.name):
                continue
            content = self._content(file, member)
            try:
                value = json.loads(content) if kind == "json" else content.decode().strip()
                if isinstance(value, dict):
                    value = next((value[key] for key in _LABEL_KEYS if key in value), None)
            except MALFORMED as error:
                problem = f"the label in {member.name} cannot be read ({first_line(error)})"
                raise ArgumentError("SRC", str(file), problem) from error
            if value is None or value == "":
                continue
            if isinstance(value, str) and not value.isdecimal():
                return value
            number = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
            if number and len(str(value)) <= 18 and int(value) < MAX_CLASSES:
                return int(value)
            rule = f"a label must be a number from 0 to {MAX_CLASSES - 1:,}, or the name of a class"
            raise ArgumentError("SRC", str(file), f"{member.name} holds {value!r:.40}; {rule}")
        return None


def too_large(size: int) -> str:
    """Return why a file of so many bytes is not read, or ""."""
    try:
        require_size(size)
    except ValueError as error:
        return str(error)
    return ""


def _is_folder(member: zipfile.ZipInfo) -> bool:
    return member.filename.endswith(("/", "\\"))


def tar_files(pattern: str) -> list[Path]:
    """Return the tar files of a path: itself, those in a folder, or those that match `*`, `?`, `[...]` or `{a..b}`."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(one for one in path.iterdir() if one.suffix == ".tar" and not one.name.startswith("."))
    # A name without `*`, `?` or `[` is kept if it does not exist, so that the error names the missing shard.
    matches = {
        one for each in _expand_braces(str(path)) for one in (glob.glob(each) if glob.has_magic(each) else [each])
    }
    return [Path(one) for one in sorted(matches)]


def _expand_braces(pattern: str) -> Iterator[str]:
    """`x-{000..012}.tar`, as webdataset writes patterns, to each of its names."""
    head, opening, rest = pattern.partition("{")
    inner, closing, tail = rest.partition("}")
    first, dots, last = inner.partition("..")
    if not (opening and closing and dots and first.isdecimal() and last.isdecimal()):
        yield pattern
        return
    for number in range(int(first), int(last) + 1):
        yield from _expand_braces(f"{head}{number:0{len(first)}}{tail}")


def _is_table(name: str) -> bool:
    """Return whether a member may be the dataset.json of a set."""
    return name.rpartition("/")[2] == DATASET_JSON


def _sample_key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _is_compressed(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(6)
    except OSError:
        return False
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
