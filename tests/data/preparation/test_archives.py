"""Zips with odd names, wrong sizes, damage and interruptions. Their contents as a set are tested in test_prepare.py."""

from __future__ import annotations

import contextlib
import io
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from published import noise, save

from fastgan.data import open_source
from fastgan.data.preparation import prepare as preparation
from fastgan.data.preparation.archives import TarCollection, ZipCollection
from fastgan.data.preparation.prepare import prepare
from fastgan.data.preparation.settings import Settings
from fastgan.data.preparation.state import PreparationState
from fastgan.errors import ArgumentError

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def png(tmp_path: Path, seed: int = 0) -> bytes:
    return save(tmp_path / "scratch" / "image.png", noise(16, 16, 3, seed=seed)).read_bytes()


def claim_size(file: Path, size: int) -> None:
    """Set the size of the first file of a zip, in its list of files."""
    content = bytearray(file.read_bytes())
    struct.pack_into("<L", content, content.index(b"PK\1\2") + 24, size)
    file.write_bytes(content)


def test_names_that_are_hidden_or_lead_out_of_the_archive(tmp_path: Path) -> None:
    names = ["../up.png", "a/../../up.png", ".hidden.png", "a/.hidden/x.png", "__MACOSX/a.png", "/abs/x.png", "a/x.png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for seed, name in enumerate(names):
            archive.writestr(name, png(tmp_path, seed))
    before = set(tmp_path.rglob("*"))
    made = prepare(str(tmp_path / "a.zip"), tmp_path / "set", workers=1)
    assert list(made.names()) == ["a/x.png", "abs/x.png"]
    written = set(tmp_path.rglob("*")) - before
    assert written and all(path.is_relative_to(tmp_path / "set") for path in written)


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_bounded_by_the_listed_size(tmp_path: Path, method: int) -> None:
    """A bomb: 100 MB, listed as 1 kB. zipfile alone would decompress all of bzip2, and much of LZMA."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive, archive.open("a.png", "w") as member:
        for _ in range(100):
            member.write(bytes(10**6))
    claim_size(tmp_path / "a.zip", 1000)
    collection = ZipCollection(tmp_path / "a.zip")
    (image,) = collection.images()
    assert (image.size, image.problem) == (1000, "")
    tracemalloc.start()
    with pytest.raises(ValueError, match="the archive is damaged here: Bad CRC-32"):
        collection.open(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_a_file_that_is_listed_as_too_large_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(tmp_path))
        archive.writestr("b.png", png(tmp_path))
    claim_size(tmp_path / "a.zip", 2**29 + 1)
    made = prepare(str(tmp_path / "a.zip"), tmp_path / "set", workers=1)
    assert list(made.names()) == ["b.png"]
    assert (tmp_path / "set" / "skipped.txt").read_text() == "a.png\ttoo large: 537 MB, above 537 MB\n"


def test_a_worker_does_not_load_the_list_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list takes 660 bytes a file."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(tmp_path))
    collection = ZipCollection(tmp_path / "a.zip")
    (image,) = collection.images()
    monkeypatch.delattr(zipfile, "ZipFile")
    assert collection.open(image).read() == png(tmp_path)


def test_damage_anywhere_is_one_line(tmp_path: Path) -> None:
    """Bytes are changed, and the end is cut off: listing raises ArgumentError, reading a file ValueError."""
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for method in METHODS:
            archive.writestr(f"{method}/ä.png", bytes(300), compress_type=method)
    whole = (tmp_path / "whole.zip").read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.zip"
    refused, unreadable = 0, 0
    for step in range(500):
        content = bytearray(whole[: rng.integers(len(whole))] if step % 3 == 0 else whole)
        for at in rng.integers(0, max(1, len(content)), 3 if content else 0):
            content[at] = rng.integers(256)
        damaged.write_bytes(content)
        collection = ZipCollection(damaged)
        try:
            images = list(collection.images())
        except ArgumentError as error:
            assert str(error).startswith(f"SRC must be a whole zip file, got '{damaged}'; ")
            assert len(str(error).splitlines()) == 1
            refused += 1
            continue
        for image in images:
            if image.problem:
                continue
            try:
                assert len(collection.open(image).read()) <= image.size
            except ValueError as error:
                assert str(error).startswith("the archive is damaged here: ") and len(str(error).splitlines()) == 1
                unreadable += 1
    assert refused > 100 and unreadable > 30


def test_interrupted_in_the_middle_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command continues, reads only the shards that are not finished, and writes the same bytes."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in reversed(range(12)):
            archive.writestr(f"{i % 3}/{i:02}.png", png(tmp_path, i))
    settings = Settings(per_shard=4, cache_to=8)
    whole = prepare(str(tmp_path / "a.zip"), tmp_path / "whole", settings, workers=1)
    assert list(whole.names()) == sorted(f"{i % 3}/{i:02}.png" for i in range(12))
    write = PreparationState.write

    def interrupt(state: PreparationState, kind: str, shard: int, content: object) -> None:
        write(state, kind, shard, content)
        if (kind, shard) == ("done", 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PreparationState, "write", interrupt)
        prepare(str(tmp_path / "a.zip"), tmp_path / "set", settings, workers=1)
    assert not (tmp_path / "set" / "manifest.json").exists()
    read: list[str] = []
    pixels = ZipCollection.pixels
    monkeypatch.setattr(
        ZipCollection, "pixels", lambda self, image, *rest: (read.append(image.name), pixels(self, image, *rest))[1]
    )
    made = prepare(str(tmp_path / "a.zip"), tmp_path / "set", settings, workers=1)
    assert set(read) == set(list(whole.names())[8:])
    assert made.files == whole.files


def listed(file: Path, names: list[str], tmp_path: Path) -> dict[str, object]:
    """Name -> label of a zip with files of these names, each another image."""
    with zipfile.ZipFile(file, "w") as archive:
        for seed, name in enumerate(names):
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, png(tmp_path, seed))
    return {image.name: image.label for image in ZipCollection(file).images()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["./a/1.png", "./b/2.png"], {"a/1.png": "a", "b/2.png": "b"}),
        (["./1.png", "2.png"], {"1.png": None, "2.png": None}),
        ([".//a//1.png", "././b/./2.png"], {"a/1.png": "a", "b/2.png": "b"}),
        (["a\\1.png", "b\\2.png"], {"a/1.png": "a", "b/2.png": "b"}),
        (["top/a/1.png", "top\\b\\2.png"], {"top/a/1.png": "a", "top/b/2.png": "b"}),
        (["./", "a\\", "a/"], {}),
    ],
)
def test_names_are_those_that_unpacking_gives(tmp_path: Path, names: list[str], expected: dict[str, object]) -> None:
    assert listed(tmp_path / "a.zip", names, tmp_path) == expected


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_files_with_one_name_the_last_is_used(tmp_path: Path) -> None:
    assert list(listed(tmp_path / "a.zip", ["a.png", "./a.png", "b.png", "a.png"], tmp_path)) == ["a.png", "b.png"]
    collection = ZipCollection(tmp_path / "a.zip")
    (first, _) = collection.images()
    assert collection.open(first).read() == png(tmp_path, 3)


def test_names_in_a_tar_are_those_that_unpacking_gives(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("../a.png", ".//b.png", "././c.png", "d.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(tmp_path))
            archive.addfile(member, io.BytesIO(png(tmp_path)))
    assert [image.name for image in TarCollection(tmp_path, [tmp_path / "a.tar"]).images()] == [
        "b.png",
        "c.png",
        "d.png",
    ]


def test_of_members_with_one_name_in_a_tar_the_last_is_used(tmp_path: Path) -> None:
    """Labels too; a name of another tar is another image."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        contents = [("a.png", 0), ("a.cls", 0), ("b.png", 1), ("./a.png", 2), ("a.cls", 1), ("b.png", 3)]
        for name, number in contents:
            content = str(number).encode() if name.endswith("cls") else png(tmp_path, number)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    shutil.copy(tmp_path / "a.tar", tmp_path / "b.tar")
    collection = TarCollection(tmp_path, [tmp_path / "a.tar", tmp_path / "b.tar"])
    images = list(collection.images())
    assert [(image.name, image.label, image.problem) for image in images] == [
        *(("a.tar/a.png", 1, ""), ("a.tar/b.png", None, "")),
        *(("b.tar/a.png", 1, ""), ("b.tar/b.png", None, "")),
    ]
    assert [collection.open(image).read() for image in images] == [png(tmp_path, 2), png(tmp_path, 3)] * 2


def test_a_bomb_is_bounded_by_what_an_image_may_be(tmp_path: Path) -> None:
    """3.3 GB in 3 MB: the listed size is right, and too large for an image."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(tmp_path))
        archive.writestr("b.png", bytes(1000))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into("<L", content, content.rindex(b"PK\1\2") + 24, 3_300_000_000)
    (tmp_path / "a.zip").write_bytes(content)
    problems = {image.name: image.problem for image in ZipCollection(tmp_path / "a.zip").images()}
    assert problems == {"a.png": "", "b.png": "too large: 3.3 GB, above 537 MB"}


RECORDS = ("asked.json", "listed.json", "items/00000.json", "looked/00000.json", "done/00000.json")


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("content", [b"[" * 5000, b"[1]", b'{"late": 3}', b"[[1]]", b"null", b"\xff"])
def test_an_edited_state_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    """The state of an interrupted preparation, from which the same command would go on."""
    save(tmp_path / "photos" / "a.png", noise(16, 16, 3))
    settings = Settings(per_shard=1)
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(tmp_path / "photos"), tmp_path / "set", settings, workers=1)
    (tmp_path / "set" / ".preparing" / name).write_bytes(content)
    with contextlib.suppress(ArgumentError):  # or the record is made again
        prepare(str(tmp_path / "photos"), tmp_path / "set", settings, workers=1)


@pytest.mark.parametrize("archive", [False, True])
def test_a_stray_file_that_costs_all_labels_is_named(tmp_path: Path, archive: bool) -> None:
    photos = tmp_path / "photos"
    for i, name in enumerate(("a/1.png", "a/2.png", "b/3.png", "stray.png")):
        save(photos / name, noise(16, 16, 3, seed=i))
    src = photos
    if archive:
        src = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photos))
    lines: list[str] = []
    assert prepare(str(src), tmp_path / "set", workers=1, report=lines.append).num_classes == 0
    assert any("no labels: a/1.png has one, and stray.png has none; move it" in line for line in lines)
    (note,) = open_source(f"folder:{photos}", 16).notes
    assert note.startswith("no labels: stray.png is in no subfolder")
