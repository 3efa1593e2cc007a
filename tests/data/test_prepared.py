from __future__ import annotations

import io
import json
import math
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgan.data.images import area_average
from fastgan.data.prepared import mapping
from fastgan.data.prepared.manifest import MANIFEST, Manifest, fingerprint, is_prepared, read_manifest
from fastgan.data.prepared.reader import Level, PreparedSource
from fastgan.errors import ArgumentError
from fastgan.utils.files import FileRecord

Writer = Callable[..., Manifest]


def smooth(n: int, channels: int, side: int) -> np.ndarray:
    """Images that JPEG hardly changes: uint8 [n, channels, side, side]."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, channels, 4, 4)).astype(np.uint8)
    up = [Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC) for plane in coarse.reshape(-1, 4, 4)]
    return np.stack([np.asarray(one) for one in up]).reshape(n, channels, side, side)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / MANIFEST
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
def test_written_images_are_read_back(tmp_path: Path, prepared_set: Writer, encoding: str, channels: int) -> None:
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


def test_a_set_can_be_read_with_numpy_and_tarfile_alone(tmp_path: Path, prepared_set: Writer) -> None:
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


_BACK = ((0, 5), (5, 2), (7, -1))


def test_damaged_manifests(tmp_path: Path, prepared_set: Writer) -> None:
    assert f"{tmp_path / 'manifest.json'} is missing" in refusal(tmp_path)
    prepared_set(tmp_path, smooth(6, 1, 16))
    whole = (tmp_path / MANIFEST).read_text()
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "does not have the format": lambda m: m.update(format="other"),
        "schema 2": lambda m: m.update(schema=2),
        "KeyError: 'count'": lambda m: m.pop("count"),
        "images in shards, count 7": lambda m: m.update(count=7),
        "shard 1 has images": lambda m: m["shards"][1].update(first=4),
        "cache/0004/00001.npy is not listed": lambda m: m["files"].pop("cache/0004/00001.npy"),
        "../../x is not a file of such a set": lambda m: m["files"].update({"../../x": {"bytes": 1, "sha256": ""}}),
        "resolutions: [4, 16]": lambda m: m.update(resolutions=[4, 16]),
        "cached: [8]": lambda m: m.update(cached=[8]),
        "encoding: pickle": lambda m: m.update(encoding="pickle"),
        "TypeError": lambda m: m.update(shards=[3]),
        "OverflowError": lambda m: m.update(count=math.inf),
        "AttributeError": lambda m: m.update(files=[]),
        "schema 0": lambda m: m.update(schema=0),
        "resolutions: [4, 8, 16]": lambda m: m.update(resolution=17),
        "channels: 2": lambda m: m.update(channels=2),
        "shard 2 has images 7 to 6": lambda m: m.update(shards=[{"first": a, "count": b} for a, b in _BACK]),
        "0 images in shards, count 0": lambda m: m.update(count=0, shards=[]),
    }
    for wanted, change in changes.items():
        (tmp_path / MANIFEST).write_text(whole)
        edit(tmp_path, change)
        assert wanted in refusal(tmp_path)
    (tmp_path / MANIFEST).write_text(whole)
    below = tmp_path / "names.jsonl"
    assert refusal(below).endswith(f"{below / 'manifest.json'} cannot be read (Not a directory)")
    for cut in ("", whole[: len(whole) // 2], "[]", "\0"):
        (tmp_path / MANIFEST).write_text(cut)
        assert str(tmp_path / MANIFEST) in refusal(tmp_path)


def test_missing_and_truncated_files_are_named_on_opening(tmp_path: Path, prepared_set: Writer) -> None:
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
    with pytest.raises(ArgumentError, match="must be one of 4, 8, 16, 32, got 64"):
        Level(manifest, 64)


def test_files_of_the_right_size_with_other_contents_are_named(tmp_path: Path, prepared_set: Writer) -> None:
    """Only their headers show it."""
    prepared_set(tmp_path, smooth(6, 1, 16), np.arange(6))
    manifest = read_manifest(tmp_path)
    cache, offsets = tmp_path / "cache" / "0008" / "00000.npy", tmp_path / "encoded" / "0016" / "offsets.npy"
    others: dict[Path, list[np.ndarray]] = {
        tmp_path / "labels.npy": [np.zeros(6), np.zeros((1, 6), dtype=np.int64)],
        offsets: [np.zeros((6, 2)), np.zeros((2, 6), dtype=np.int64)],
        cache: [np.zeros((5, 1, 8, 8), dtype=np.int8), np.zeros((5, 1, 4, 16), dtype=np.uint8)],
    }
    expected = {"labels.npy": r"int64 \[6\]", "offsets.npy": r"int64 \[6, 2\]", "00000.npy": r"uint8 \[5, 1, 8, 8\]"}
    for file, arrays in others.items():
        whole = file.read_bytes()
        for array in arrays:
            np.save(file, array)
            assert file.stat().st_size == len(whole)
            with pytest.raises(ArgumentError, match=f"{file.name} holds .* instead of {expected[file.name]}"):
                PreparedSource(manifest, 16).arrays(8)
        file.write_bytes(whole)
    assert PreparedSource(manifest, 16).arrays(8) is not None


def test_nothing_is_unpickled(tmp_path: Path, prepared_set: Writer) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    prepared_set(tmp_path, smooth(90, 1, 8), np.arange(90) % 3, per_shard=50)
    labels = tmp_path / "labels.npy"
    size = labels.stat().st_size
    np.save(labels, np.array([Attack()], dtype=object), allow_pickle=True)
    with labels.open("ab") as file:
        file.write(bytes(size - file.tell()))
    with pytest.raises(ArgumentError, match=r"labels\.npy': it is not a whole \.npy file \(it holds Python objects"):
        PreparedSource(read_manifest(tmp_path), 8)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 1], [0, 0, 10**12]])
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, prepared_set: Writer, labels: list[int]) -> None:
    """On a GPU they would be a failed assertion somewhere in a later step."""
    manifest = prepared_set(tmp_path, smooth(3, 1, 8), np.array(labels))
    edit(tmp_path, lambda content: content.update(num_classes=3))
    with pytest.raises(ArgumentError, match=r"--data .*labels\.npy holds .* and the classes are 0 to 2"):
        PreparedSource(read_manifest(tmp_path), 8)
    assert manifest.count == 3


def test_more_classes_than_a_network_can_have_are_refused(tmp_path: Path, prepared_set: Writer) -> None:
    prepared_set(tmp_path, smooth(3, 1, 8), np.array([0, 0, 10**12]))
    with pytest.raises(ArgumentError, match=r"--data .* it has 1,000,000,000,001 classes; at most 1,048,576"):
        PreparedSource(read_manifest(tmp_path), 8)


def test_one_header_is_read_at_a_time(tmp_path: Path, prepared_set: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that read one at once would sometimes take a complete file for a damaged one."""
    prepared_set(tmp_path, smooth(6, 1, 16), np.arange(6))
    read, alone = np.lib.format.read_array_header_1_0, []

    def watched(*args: Any) -> Any:
        alone.append(mapping._HEADER_LOCK.locked())
        return read(*args)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", watched)
    PreparedSource(read_manifest(tmp_path), 16).arrays(8)
    assert len(alone) == 4 and all(alone)  # labels, offsets, two shards
    assert not mapping._HEADER_LOCK.locked()


def test_size_problems_of_a_file(tmp_path: Path, prepared_set: Writer) -> None:
    prepared_set(tmp_path, smooth(6, 1, 16), np.arange(6))
    manifest = read_manifest(tmp_path)
    names = tmp_path / "names.jsonl"
    names.write_bytes(names.read_bytes()[:-1])
    assert manifest.size_problem("names.jsonl").startswith("is truncated: ")
    assert manifest.size_problem("labels.npy") == ""
    shutil.rmtree(tmp_path / "encoded" / "0016")
    (tmp_path / "encoded" / "0016").touch()
    assert manifest.size_problem("encoded/0016/00000.tar") == "is missing"
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(ArgumentError, match=r"labels\.npy is missing; run `fastgan data verify`"):
        Level(manifest, 8)


def test_a_picture_too_large_to_decode_is_named(tmp_path: Path, prepared_set: Writer) -> None:
    """Pillow's refusal is not an OSError."""
    prepared_set(tmp_path, smooth(6, 1, 16), encoding="png")
    level = Level(read_manifest(tmp_path), 16)
    at = int(np.load(tmp_path / "encoded" / "0016" / "offsets.npy")[0, 0])
    header = b"IHDR" + struct.pack(">II", 2**17, 2**17) + level.encoded(0)[24:29]
    with (tmp_path / "encoded" / "0016" / "00000.tar").open("r+b") as file:
        file.seek(at + 12)
        file.write(header + struct.pack(">I", zlib.crc32(header)))
    with pytest.raises(ArgumentError, match=r"member 000000000\.png': the image cannot be decoded"):
        level.pixels(0)
    assert level.pixels(1).shape == (1, 16, 16)


def test_the_encoded_resolution_to_decode(tmp_path: Path, prepared_set: Writer) -> None:
    """The lowest that is large enough, and none that is stored decoded."""
    sides: dict[int, list[int | None]] = {2: [4, 8, 16, 32], 8: [16, 16, 16, 32], 32: [None] * 4}
    for cache_to, expected in sides.items():
        folder = tmp_path / str(cache_to)
        prepared_set(folder, smooth(6, 1, 32), cache_to=cache_to, encoding="png")
        source = PreparedSource(read_manifest(folder), 8)
        found = [source.encoded(resolution) for resolution in (4, 8, 16, 32)]
        assert [one and one.side for one in found] == expected
        assert all(list(one.kinds) == [("PNG", "L", False)] for one in found if one)
    prepared_set(tmp_path / "webp", smooth(6, 1, 32), encoding="webp")
    found = [PreparedSource(read_manifest(tmp_path / "webp"), 32).encoded(32)]
    assert found[0] is not None and list(found[0].kinds) == [("WEBP", "RGB", False)]  # WebP has no gray


def test_a_read_image_belongs_to_the_caller(tmp_path: Path, prepared_set: Writer) -> None:
    prepared_set(tmp_path, smooth(6, 1, 16))
    source = PreparedSource(read_manifest(tmp_path), 16)
    for resolution in (8, 16):
        image = source.read(0, resolution)
        whole = image.copy()
        image[:] = 0
        np.testing.assert_array_equal(source.read(0, resolution), whole)
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"image {index} of 6"):
            source.read(index, 8)


def test_the_fingerprint_depends_on_every_file_and_setting() -> None:
    one, other = FileRecord(1, "aa"), FileRecord(1, "bb")
    made = fingerprint({"x": one, "y": other}, {"quality": 95})
    assert made == fingerprint({"y": other, "x": one}, {"quality": 95})
    changed = [
        fingerprint({"x": other, "y": other}, {"quality": 95}),
        fingerprint({"x": other, "y": one}, {"quality": 95}),
        fingerprint({"x": one, "z": other}, {"quality": 95}),
        fingerprint({"x": one, "y": other}, {"quality": 90}),
    ]
    assert len({made, *changed}) == 5 and len(made) == 16
