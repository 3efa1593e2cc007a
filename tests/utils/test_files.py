"""Atomic files and locks (fastgan/utils/files.py)."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from fastgan.utils.files import FileRecord, try_lock, write_atomic
from fastgan.utils.text import readable_size


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match=f"No space .*: '{tmp_path}/file'"):
            patched.setattr(os, name, refuse)
            write_atomic(tmp_path / "file", b"after")
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
    with pytest.raises(FileNotFoundError, match=f": '{tmp_path}/none/file'"):
        write_atomic(tmp_path / "none" / "file", b"after")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="has no device that is always full")
def test_a_full_disk_is_reported_although_the_buffer_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / f".file.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        write_atomic(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())


def test_a_lock_excludes_others_and_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "lock").open("wb") as one, (tmp_path / "lock").open("wb") as other:
        assert try_lock(one.fileno()) and not try_lock(other.fileno())

        def without(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", without)
        assert try_lock(other.fileno())


def test_a_file_is_renamed_after_its_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut leaves a manifest of zeros, or a manifest of files that do not exist."""
    flush, replace, done = os.fsync, os.replace, []

    def flushed(descriptor: int) -> None:
        done.append(("flushed", os.fstat(descriptor).st_size))
        flush(descriptor)

    def renamed(one: Path, other: Path) -> None:
        done.append(("renamed", one.stat().st_size))
        replace(one, other)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    made = write_atomic(tmp_path / "file", b"content")
    assert done == [("flushed", 7), ("renamed", 7)]
    assert made == FileRecord(7, hashlib.sha256(b"content").hexdigest())


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999.7, "1 kB"),
        (12_345, "12.3 kB"),
        (999_600, "1 MB"),
        (2**30, "1.07 GB"),
        (1.2345e15, "1234 TB"),
    ],
)
def test_sizes_for_people(size: float, words: str) -> None:
    assert readable_size(size) == words
