"""Atomic files and file locks. An atomic file is complete or does not exist: it is renamed once it is on the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and content of a file.

    Attributes:
        bytes: its size.
        sha256: hash of its content, in hex.
    """

    bytes: int
    sha256: str


class AtomicFile:
    """A file that is written under a hidden name and gets its own name in `commit`.

    As a context manager it discards what was not committed.

    Args:
        file: the final name; an existing file is replaced.

    Raises:
        OSError: with the final name, whatever failed.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        # The name has the process id: a process that was killed may still be writing when the next one starts.
        self._partial = file.with_name(f".{file.name}.{os.getpid()}.part")
        self._digest = hashlib.sha256()
        self._committed = False
        self.bytes = 0
        with self._named():
            self._stream = self._partial.open("wb", buffering=2**20)

    def write(self, content: bytes | memoryview) -> None:
        """Append `content`."""
        with self._named():
            self._stream.write(content)
        self._digest.update(content)
        self.bytes += len(content)

    def flush(self) -> None:
        """Force what was written to the disk, still under the hidden name."""
        with self._named():
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def commit(self) -> FileRecord:
        """Flush the file to the disk and rename it."""
        self.flush()
        with self._named():
            self._stream.close()
            os.replace(self._partial, self._file)
        self._committed = True
        return FileRecord(self.bytes, self._digest.hexdigest())

    def discard(self) -> None:
        """Remove the partial file. Does nothing after `commit`."""
        if self._committed:
            return
        with contextlib.suppress(OSError):  # the disk may be too full for what is buffered
            self._stream.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._file)) from error


def write_atomic(file: Path, content: bytes | memoryview) -> FileRecord:
    """Write a whole file atomically.

    Raises:
        OSError: with the file's name, whatever failed.
    """
    with AtomicFile(file) as out:
        out.write(content)
        return out.commit()


def open_regular(file: Path, flags: int) -> int:
    """Open a file, and refuse a named pipe or a device, on which opening, reading or writing may wait forever.

    Args:
        file: the file.
        flags: as for `os.open`.

    Returns:
        A file descriptor.

    Raises:
        OSError: it is not a regular file, or cannot be opened.
    """
    try:
        descriptor = os.open(file, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe without a reader
            raise OSError(errno.EINVAL, "not a regular file", str(file)) from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_regular(file: Path) -> bytes:
    """Return the content of a file; see `open_regular`."""
    with open(open_regular(file, os.O_RDONLY), "rb") as stream:
        return stream.read()


def open_appending(file: Path) -> IO[str]:
    """Open a file to append UTF-8 text; it is made if it is missing. See `open_regular`."""
    return open(open_regular(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8")


def append_regular(file: Path, text: str) -> None:
    """Append UTF-8 text to a file; see `open_appending`."""
    with open_appending(file) as stream:
        stream.write(text)


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, without waiting. The lock ends when the file is closed, also by a kill.

    Returns:
        False if another process has the lock; True if the file is locked, or the file system has no locks.
    """
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
