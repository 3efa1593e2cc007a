"""Image files of others: what is whole, which sample means which gray, and which errors are the machine's."""

from __future__ import annotations

import builtins
import errno
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from published import cifar10, noise, save

from fastgan.data import images, open_source
from fastgan.data.faults import is_machine_fault, machine_error
from fastgan.data.preparation.inputs import PreparedCollection
from fastgan.data.preparation.prepare import prepare
from fastgan.data.preparation.settings import Settings
from fastgan.data.prepared.manifest import is_prepared
from fastgan.errors import ArgumentError


def photo(**options: Any) -> bytes:
    """A JPEG."""
    out = io.BytesIO()
    Image.effect_noise((128, 96), 60).convert("RGB").save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def zeros_from_the_middle(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    image = Image.effect_noise((128, 128), 60).convert("RGB")
    image.save(out, kind, **({"sizes": [(128, 128)]} if kind == "ICO" else {}))
    return out.getvalue()


def with_thumbnail_only() -> bytes:
    """A JPEG that is cut right behind the thumbnail in its EXIF data, which ends as a whole JPEG does."""
    exif = b"Exif\0\0" + photo()
    whole = photo()
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:300]


DAMAGED: dict[str, Callable[[], bytes]] = {
    "began anew.jpg": lambda: photo()[:2000] + photo(),
    "thumbnail.jpg": with_thumbnail_only,
    "cut.jpg": lambda: photo()[:2000],
    "zeros.ico": lambda: zeros_from_the_middle(encoded("ICO")),
    "zeros.png": lambda: zeros_from_the_middle(encoded("PNG")),
    "cut.qoi": lambda: encoded("QOI")[:2000],
    "cut.webp": lambda: encoded("WEBP")[:2000],
}


def test_what_cannot_be_decoded_whole_is_skipped_by_folder_and_prepare_alike(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    save(photos / "whole.png", noise(16, 16, 3))
    for name, content in DAMAGED.items():
        (photos / name).write_bytes(content())
    source = open_source(f"folder:{photos}", 16)
    assert {name for name, _ in source.skipped} == set(DAMAGED)
    made = prepare(str(photos), tmp_path / "set", workers=1)
    listed = dict(line.split("\t") for line in (made.path / "skipped.txt").read_text().splitlines())
    assert listed == dict(source.skipped)
    for index in range(len(source)):
        source.read(index, 16)  # nothing that passed stops a run


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "ICO", "QOI"])
def test_inspection_and_decoding_say_the_same_of_zeros(kind: str) -> None:
    """Some decoders fill in what is missing: then the image is used, and does not stop a run."""
    content = zeros_from_the_middle(encoded(kind))
    info = images.inspect_image(lambda: io.BytesIO(content), "x")
    if info.problem:
        with pytest.raises(Exception):  # noqa: B017  (Pillow's readers raise nearly any exception)
            images.decode(content, 16, 3)
    else:
        images.decode(content, 16, 3)


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 1.01, 200])
def test_floats_are_0_to_255_whatever_the_image_holds(top: float) -> None:
    pixels = np.zeros((8, 8), np.float32)
    pixels[:4] = top
    gray = np.asarray(images.convert(Image.fromarray(pixels), "L"))
    assert set(gray.ravel()) == {0, round(top)}


@pytest.mark.parametrize("value", [-1, 65_536, 2**31 - 1])
def test_integers_out_of_range_are_skipped_with_the_reason(tmp_path: Path, value: int) -> None:
    pixels = np.full((8, 8), 40_000, np.int32)
    save(tmp_path / "a.tif", pixels)
    pixels[0, 0] = value
    save(tmp_path / "b.tif", pixels)
    source = open_source(f"folder:{tmp_path}", 8)
    assert len(source) == 1
    assert "0 to 65,535 are read" in dict(source.skipped)["b.tif"]
    np.testing.assert_array_equal(source.read(0, 8), round(40_000 / 65_535 * 255))


def test_12_bits_fill_the_range(tmp_path: Path) -> None:
    """A TIFF with 12 bits a sample, two of which share three bytes."""
    samples = np.full(64, 4095)
    samples[0] = 2048
    packed = b"".join(struct.pack(">I", a << 12 | b)[1:] for a, b in samples.reshape(-1, 2).tolist())
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (278, 4, 8)]
    tags.append((279, 4, len(packed)))
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in tags)
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed
    (tmp_path / "a.tif").write_bytes(file)
    found = open_source(f"folder:{tmp_path}", 8).read(0, 8)[0]
    assert (found[0, 0], found[0, 1]) == (round(2048 / 4095 * 255), 255)


def test_lab_becomes_gray() -> None:
    gray = np.asarray(images.convert(Image.new("LAB", (8, 8), (128, 128, 128)), "L"))
    assert (np.abs(gray.astype(int) - 118) < 8).all()


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_of_any_length_cost_no_image(tmp_path: Path, compressed: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=compressed)
    save(tmp_path / "a.png", noise(16, 16, 3), pnginfo=info)
    np.testing.assert_array_equal(
        open_source(f"folder:{tmp_path}", 16).read(0, 16), noise(16, 16, 3).transpose(2, 0, 1)
    )


def test_a_profile_that_unpacks_to_100_mb_is_ignored(tmp_path: Path) -> None:
    content = save(tmp_path / "a.png", noise(16, 16, 3)).read_bytes()
    bomb = b"name\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(bomb)) + b"iCCP" + bomb + struct.pack(">I", zlib.crc32(b"iCCP" + bomb))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    assert len(open_source(f"folder:{tmp_path}", 16)) == 1


def test_a_large_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "big.png", noise(16, 16, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert len(open_source(f"folder:{tmp_path}", 16)) == 1
    (record,) = caplog.records
    assert "big.png is unusually large: 16 x 16 px" in record.getMessage()


def test_a_file_larger_than_an_image_may_be_is_not_read(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(16, 16, 3))
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)
    assert dict(open_source(f"folder:{tmp_path}", 16).skipped) == {"b.png": "too large: 537 MB, above 537 MB"}


# --- the machine ------------------------------------------------------------------------------------------------------

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


def test_too_many_open_files_says_so() -> None:
    text = str(machine_error("--data", "a.png", OSError(errno.EMFILE, "Too many open files")))
    assert "Too many open files" in text and "ulimit -n" in text


def test_damage_is_no_fault_of_the_machine() -> None:
    for error in (OSError("image file is truncated"), ValueError("x"), builtins.EOFError(), PermissionError(13, "no")):
        assert not is_machine_fault(error)
    for error in (OSError(-9), OSError("out of memory error when reading image file"), MemoryError()):
        assert is_machine_fault(error)
