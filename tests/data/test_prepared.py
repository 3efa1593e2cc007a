from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgan.data import prepared
from fastgan.data.files import File, size_in_words, write_whole
from fastgan.data.images import area_average
from fastgan.data.prepared import Level, Manifest, is_prepared, read_manifest
from fastgan.errors import ArgumentError

Writer = Callable[..., Manifest]


def smooth(n: int, channels: int, side: int) -> np.ndarray:
    """Pictures that JPEG keeps nearly as they are: uint8 [n, channels, side, side]."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, channels, 4, 4)).astype(np.uint8)
    up = [Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC) for plane in coarse.reshape(-1, 4, 4)]
    return np.stack([np.asarray(one) for one in up]).reshape(n, channels, side, side)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / prepared.MANIFEST
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(ArgumentError) as error:
        read_manifest(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("encoding", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, prepared_set: Writer, encoding: str, channels: int) -> None:
    images, labels = smooth(13, channels, 32), np.arange(13) % 3
    made = prepared_set(tmp_path, images, labels, encoding=encoding)
    manifest = read_manifest(tmp_path)
    assert manifest == made
    assert is_prepared(tmp_path) and not is_prepared(tmp_path / "cache") and not is_prepared(tmp_path / "names.jsonl")
    np.testing.assert_array_equal(manifest.labels(), labels)
    assert list(manifest.names()) == [f"image {i}" for i in range(13)]
    assert [(one.first, one.count) for one in manifest.shards] == [(0, 5), (5, 4), (9, 4)]
    for resolution in (4, 8, 16, 32):
        level = Level(manifest, resolution)
        exact = level.cached or encoding != "jpeg"
        for i, image in enumerate(images):
            difference = level.pixels(i).astype(int) - area_average(image, resolution)
            assert np.abs(difference).mean() <= (0 if exact else 3), (resolution, i)


def test_a_stranger_reads_it_with_numpy_and_tarfile(tmp_path: Path, prepared_set: Writer) -> None:
    images, labels = smooth(9, 3, 16), np.arange(9) % 4
    prepared_set(tmp_path, images, labels, encoding="png")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    offsets = np.load(tmp_path / "encoded" / "0016" / "offsets.npy")
    for number, shard in enumerate(manifest["shards"]):
        rows = slice(shard["first"], shard["first"] + shard["count"])
        cache = np.load(tmp_path / "cache" / "0008" / f"{number:05}.npy")
        np.testing.assert_array_equal(cache, area_average(images[rows], 8))
        tar = tmp_path / "encoded" / "0016" / f"{number:05}.tar"
        raw = tar.read_bytes()
        with tarfile.open(tar) as members:
            found = members.getmembers()
            assert [one.name for one in found] == [f"{i:09}.{end}" for i in range(9)[rows] for end in ("png", "cls")]
            for i in range(9)[rows]:
                at, length = offsets[i]
                pixels = np.asarray(Image.open(io.BytesIO(raw[at : at + length])))
                np.testing.assert_array_equal(pixels.transpose(2, 0, 1), images[i])
                assert members.extractfile(f"{i:09}.cls").read() == str(labels[i]).encode()  # type: ignore[union-attr]


def test_a_shard_without_images(tmp_path: Path, prepared_set: Writer) -> None:
    images = smooth(8, 1, 16)
    prepared_set(tmp_path, images, per_shard=1)
    manifest = read_manifest(tmp_path)
    assert manifest.shards[1].count == 0
    for resolution in (8, 16):
        level = Level(manifest, resolution)
        assert np.abs(level.pixels(1).astype(int) - area_average(images[1], resolution)).mean() < 1.5


def test_damaged_manifests(tmp_path: Path, prepared_set: Writer) -> None:
    assert f"{tmp_path / 'manifest.json'} is missing" in refusal(tmp_path)
    prepared_set(tmp_path, smooth(6, 1, 16))
    whole = (tmp_path / prepared.MANIFEST).read_text()
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "not of the format": lambda m: m.update(format="other"),
        "schema 2": lambda m: m.update(schema=2),
        "KeyError: 'count'": lambda m: m.pop("count"),
        "images in shards, count 7": lambda m: m.update(count=7),
        "shard 1 has images": lambda m: m["shards"][1].update(first=4),
        "cache/0004/00001.npy is not listed": lambda m: m["files"].pop("cache/0004/00001.npy"),
        "../../x is no file of such a set": lambda m: m["files"].update({"../../x": {"bytes": 1, "sha256": ""}}),
        "resolutions: [4, 16]": lambda m: m.update(resolutions=[4, 16]),
        "cached: [8]": lambda m: m.update(cached=[8]),
        "encoding: pickle": lambda m: m.update(encoding="pickle"),
        "TypeError": lambda m: m.update(shards=[3]),
        "OverflowError": lambda m: m.update(count=math.inf),
    }
    for wanted, change in changes.items():
        (tmp_path / prepared.MANIFEST).write_text(whole)
        edit(tmp_path, change)
        assert wanted in refusal(tmp_path)
    for cut in ("", whole[: len(whole) // 2], "[]", "\0"):
        (tmp_path / prepared.MANIFEST).write_text(cut)
        assert str(tmp_path / prepared.MANIFEST) in refusal(tmp_path)


def test_missing_and_cut_files_are_named_when_a_resolution_is_opened(tmp_path: Path, prepared_set: Writer) -> None:
    prepared_set(tmp_path, smooth(6, 1, 32), np.arange(6))
    manifest = read_manifest(tmp_path)
    cut = tmp_path / "encoded" / "0016" / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ArgumentError, match=r"0016/00001.tar is truncated: [\d,]+ of [\d,]+ bytes"):
        Level(manifest, 16)
    (tmp_path / "cache" / "0004" / "00000.npy").unlink()
    with pytest.raises(ArgumentError, match=r"0004/00000.npy is missing"):
        Level(manifest, 4)
    index = tmp_path / "encoded" / "0032" / "00000.idx"
    index.write_text(index.read_text() + "jpg 1 2 x\n")
    with pytest.raises(ArgumentError, match=r"0032/00000.idx is too long"):
        Level(manifest, 32)
    assert Level(manifest, 8).pixels(5).shape == (1, 8, 8)
    with pytest.raises(ArgumentError, match="holds 4, 8, 16, 32"):
        Level(manifest, 64)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match=f"No space .*: '{tmp_path}/file'"):
            patched.setattr(os, name, refuse)
            write_whole(tmp_path / "file", b"after")
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
    with pytest.raises(FileNotFoundError, match=f": '{tmp_path}/none/file'"):
        write_whole(tmp_path / "none" / "file", b"after")


def test_a_file_has_its_name_once_its_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves a manifest of zeros, or one of files that are not there."""
    flush, replace, done = os.fsync, os.replace, []

    def flushed(descriptor: int) -> None:
        done.append(("flushed", os.fstat(descriptor).st_size))
        flush(descriptor)

    def renamed(one: Path, other: Path) -> None:
        done.append(("renamed", one.stat().st_size))
        replace(one, other)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    made = write_whole(tmp_path / "file", b"content")
    assert done == [("flushed", 7), ("renamed", 7)]
    assert made == File(7, hashlib.sha256(b"content").hexdigest())


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
    assert size_in_words(size) == words
