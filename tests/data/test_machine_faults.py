"""Errors of the disk, of memory and of the number of open files: the command stops and names the file."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageOps
from published import cifar10, noise, save

from fastgan.data import images, open_source, walk
from fastgan.data.faults import is_machine_fault, machine_error
from fastgan.data.preparation.inputs import PreparedCollection
from fastgan.data.preparation.prepare import prepare
from fastgan.data.preparation.settings import Settings
from fastgan.data.preparation.verification import spot_check, verify
from fastgan.data.prepared import manifest
from fastgan.data.prepared.manifest import is_prepared
from fastgan.errors import ArgumentError

FAULTS = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.ESTALE, "Stale file handle"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    MemoryError(),
]


def photos_that_fail(folder: Path, fault: BaseException, monkeypatch: pytest.MonkeyPatch, place: str) -> Path:
    """Six images, of which the fifth meets `fault`, while it is opened or while it is decoded."""
    for i in range(6):
        save(folder / f"{i}.png", noise(16, 16, 3, seed=i))
    if place == "opening":
        real_open = Path.open

        def failing_open(self: Path, *args: Any, **options: Any) -> Any:
            if self.name == "4.png":
                raise fault
            return real_open(self, *args, **options)

        monkeypatch.setattr(Path, "open", failing_open)
    else:
        real_load, content = images._load, (folder / "4.png").read_bytes()

        def failing_load(given: bytes, *args: Any) -> Any:
            if given == content:
                raise fault
            return real_load(given, *args)

        monkeypatch.setattr(images, "_load", failing_load)
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: getattr(fault, "strerror", None) or "MemoryError")
@pytest.mark.parametrize("place", ["opening", "decoding"])
def test_a_fault_of_the_machine_costs_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, place: str
) -> None:
    photos = photos_that_fail(tmp_path / "photos", fault, monkeypatch, place)
    with pytest.raises(ArgumentError, match=r"4\.png.* cannot be read now") as error:
        open_source(f"folder:{photos}", 16)
    assert "\n" not in str(error.value)
    with pytest.raises(ArgumentError, match=r"4\.png.* cannot be read now"):
        prepare(str(photos), tmp_path / "set", workers=1)
    assert not is_prepared(tmp_path / "set")


def test_a_published_set_that_cannot_be_read_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path / "root")

    def failing(*_: Any, **__: Any) -> np.ndarray:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(np, "fromfile", failing)
    with pytest.raises(ArgumentError, match=r"--data 'cifar10:.*' *: it cannot be read now .Input/output error"):
        open_source(f"cifar10:{tmp_path / 'root'}", 32)


def test_a_folder_that_cannot_be_listed_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / "photos" / name, noise(16, 16, 3))
    real = os.scandir

    def failing(path: Any) -> Any:
        if Path(path).name == "b":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(ArgumentError, match=r"b.* cannot be read now .Input/output error"):
        open_source(f"folder:{tmp_path / 'photos'}", 16)


def test_a_prepared_set_that_vanishes_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", noise(16, 16, 3, seed=i))
    first = prepare(str(tmp_path / "photos"), tmp_path / "first", Settings(per_shard=1), workers=1).path
    real = PreparedCollection.pixels

    def vanishing(self: PreparedCollection, image: Any, *args: Any) -> np.ndarray:
        if image.location[0] == 2 and (first / "cache").exists():
            (first / "cache").rename(first / "gone")
        return real(self, image, *args)

    monkeypatch.setattr(PreparedCollection, "pixels", vanishing)
    with pytest.raises(ArgumentError, match="cannot be read now"):
        prepare(str(first), tmp_path / "second", Settings(resolution=8), workers=1)
    assert not is_prepared(tmp_path / "second")


EIO = OSError(errno.EIO, "Input/output error")


def fail_for(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let os.stat fail for files of these names, and of all files the status of what a link leads to."""
    real = os.stat

    def failing(path: Any, **options: Any) -> os.stat_result:
        if options.get("follow_symlinks", True) and not isinstance(path, int) and Path(os.fsdecode(path)).name in names:
            raise EIO
        return real(path, **options)

    monkeypatch.setattr(os, "stat", failing)


@pytest.mark.parametrize("read", ["folder", "prepare"])
def test_a_link_that_cannot_be_followed_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    save(tmp_path / "real.png", noise(16, 16, 3))
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).symlink_to("../real.png")
    (tmp_path / "photos" / "c.png").symlink_to("../gone.png")
    assert open_source(str(tmp_path / "photos"), 16).skipped == [("c.png", "a link that leads nowhere")]
    fail_for(monkeypatch, "b.png")
    with pytest.raises(ArgumentError, match=r"b\.png'.*cannot be read now .Input/output error"):
        if read == "folder":
            open_source(str(tmp_path / "photos"), 16)
        else:
            prepare(str(tmp_path / "photos"), tmp_path / "set", workers=1)


def test_an_image_that_cannot_be_turned_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", failing)
    with pytest.raises(MemoryError):
        images.decode(save(tmp_path / "a.png").read_bytes(), 16, 3)


def test_a_manifest_that_cannot_be_read_now_is_no_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "photos" / "a.png", noise(16, 16, 3))
    path = prepare(str(tmp_path / "photos"), tmp_path / "set", workers=1).path
    save(path / "stray.png")

    def failing(file: Path) -> bytes:
        raise EIO

    monkeypatch.setattr(manifest, "read_regular", failing)
    with pytest.raises(ArgumentError, match=r"--data .*manifest\.json'.*cannot be read now"):
        open_source(str(path), 16)
    with pytest.raises(ArgumentError, match=r"SRC .*manifest\.json'.*cannot be read now"):
        prepare(str(path), tmp_path / "other", workers=1)
    with pytest.raises(ArgumentError, match=r"DST .*manifest\.json'.*cannot be read now"):
        prepare(str(tmp_path / "photos"), path, workers=1)


@pytest.mark.parametrize("name", ["config.yaml", ".preparing"])
def test_a_folder_whose_kind_cannot_be_told_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It may be a run, or a set that is not finished."""
    save(tmp_path / "photos" / "a" / "1.png")
    fail_for(monkeypatch, name)
    with pytest.raises(ArgumentError, match=rf"{name}'.*cannot be read now"):
        open_source(str(tmp_path / "photos"), 16)


def test_a_class_folder_whose_status_cannot_be_read_now(tmp_path: Path) -> None:
    class Entry:
        path = str(tmp_path / "b")

        def is_dir(self) -> bool:
            raise EIO

    with pytest.raises(ArgumentError, match=r"SRC .*b'.*cannot be read now"):
        walk.is_folder(Entry(), "SRC")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_cannot_be_read_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    save(tmp_path / "photos" / "a.png")
    src = shutil.make_archive(str(tmp_path / "in"), kind, tmp_path / "photos")

    def failing(*_: object, **__: object) -> None:
        raise EIO

    monkeypatch.setattr(*((zipfile, "_EndRecData", failing) if kind == "zip" else (tarfile.TarFile, "next", failing)))
    with pytest.raises(ArgumentError, match=rf"SRC .*in\.{kind}'.*cannot be read now .Input/output error"):
        prepare(src, tmp_path / "set", workers=1)


@pytest.mark.parametrize("place", ["stat", "open"])
def test_verify_takes_no_fault_of_the_machine_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    save(tmp_path / "photos" / "a.png", noise(16, 16, 3))
    made = prepare(str(tmp_path / "photos"), tmp_path / "set", workers=1)

    real = getattr(Path, place)

    def failing(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "names.jsonl":
            raise EIO
        return real(self, *args, **options)

    monkeypatch.setattr(Path, place, failing)
    with pytest.raises(ArgumentError, match=r"DST .*names\.jsonl'.*cannot be read now"):
        list(verify(made))
    with pytest.raises(ArgumentError, match=r"--data .*names\.jsonl'.*cannot be read now"):
        spot_check(made, 16)


def test_too_many_open_files_says_so() -> None:
    text = str(machine_error("--data", "a.png", OSError(errno.EMFILE, "Too many open files")))
    assert "Too many open files" in text and "ulimit -n" in text


def test_damage_is_no_fault_of_the_machine() -> None:
    for error in (OSError("image file is truncated"), ValueError("x"), builtins.EOFError(), PermissionError(13, "no")):
        assert not is_machine_fault(error)
    for error in (OSError(-9), OSError("out of memory error when reading image file"), MemoryError()):
        assert is_machine_fault(error)
