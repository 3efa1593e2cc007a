"""Files that are whole or not there at all: hashed while written, flushed to the disk, then renamed. And locks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class File:
    """What the manifest says of a file: its size and its sha256 in hex."""

    bytes: int
    sha256: str


class AtomicFile:
    """A file under a hidden name until it is finished.

    Raises: OSError with the file's own name, whatever failed.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        # With the process in the name: one that was killed may still be writing when the next one begins.
        self._partial = file.with_name(f".{file.name}.{os.getpid()}.part")
        self._digest = hashlib.sha256()
        self._finished = False
        self.bytes = 0
        with self._named():
            self._stream = self._partial.open("wb", buffering=2**20)

    def write(self, content: bytes | memoryview) -> None:
        with self._named():
            self._stream.write(content)
        self._digest.update(content)
        self.bytes += len(content)

    def flush(self) -> None:
        """Force what was written to the disk, still under the hidden name."""
        with self._named():
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def finish(self) -> File:
        self.flush()
        with self._named():
            self._stream.close()
            os.replace(self._partial, self._file)
        self._finished = True
        return File(self.bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        """Leave nothing behind; after `finish` there is nothing to leave."""
        if self._finished:
            return
        with contextlib.suppress(OSError):  # what is still buffered may not fit: it is not wanted
            self._stream.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._file)) from error


def write_atomic(file: Path, content: bytes) -> File:
    """A small file at once."""
    out = AtomicFile(file)
    try:
        out.write(content)
        return out.finish()
    finally:
        out.abandon()


def array_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file in C order, for writing what follows piece by piece; dtype as in "|u1" or "<i8"."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def try_lock(descriptor: int) -> bool:
    """Whether this process holds the lock now; it is let go when the file is closed, also by a kill."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True
