"""Image files of others: which are opened, what is whole, and which sample means which gray."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin, features
from published import noise, save

import fastgan
from fastgan.data import images, open_source
from fastgan.data.preparation.prepare import prepare
from fastgan.data.preparation.settings import Settings
from fastgan.errors import ArgumentError
from fastgan.projection import read_picture


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


def starts_ghostscript() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "EPS")
    return out.getvalue()


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program `gs` in front of any other; it must not be started."""
    log = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = --version ]\n')
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    yield
    assert not log.exists(), log.read_text()


@pytest.mark.usefixtures("ghostscript")
def test_no_way_in_starts_a_program(tmp_path: Path) -> None:
    """Pillow goes by the content, so that a picture of any name may be EPS."""
    content, photos = starts_ghostscript(), tmp_path / "photos"
    save(photos / "a.png", noise(16, 16, 3))
    (photos / "b.png").write_bytes(content)
    assert dict(open_source(str(photos), 16).skipped) == {"b.png": images.UNREAD}
    for kind in ("folder", "zip", "tar"):
        src = shutil.make_archive(str(tmp_path / "in"), kind, photos) if kind != "folder" else str(photos)
        made = prepare(src, tmp_path / kind, Settings(cache_to=8), workers=1)
        assert (made.count, made.skipped) == (1, 1)
    with pytest.raises(ArgumentError, match=images.UNREAD):
        read_picture(photos / "b.png", 16, 3)

    offset, length = np.load(tmp_path / "folder" / "encoded" / "0016" / "offsets.npy")[0]
    with (tmp_path / "folder" / "encoded" / "0016" / "00000.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n".ljust(length, b"\n"))
    with pytest.raises(ArgumentError, match=images.UNREAD):
        open_source(str(tmp_path / "folder"), 16).read(0, 16)


def test_images_are_opened_in_one_place() -> None:
    """Pillow's `open` is called once in the package, with formats."""
    calls = []
    for file in Path(fastgan.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                calls.append((file.name, [keyword.arg for keyword in node.keywords]))
    assert calls == [("images.py", ["formats"])]


def test_the_formats_that_are_read_start_nothing_and_open_nothing() -> None:
    """Their modules in Pillow neither start programs nor open an image in any format when they read."""
    Image.init()
    for kind in images._readable():
        if kind in ("JPEG", "GIF"):  # programs in functions that are not called: load_djpeg and _save_netpbm
            continue
        text = Path(inspect.getfile(Image.OPEN[kind][0])).read_text().partition("if __name__")[0]
        assert not re.search(r"subprocess|os\.system|Image\.open\(", text), kind


@pytest.mark.parametrize("kind", [kind for kind in images.FORMATS if kind not in ("PSD", "AVIF")])
def test_every_format_is_read(kind: str) -> None:
    info = images.inspect_image(lambda: io.BytesIO(encoded(kind)), "x")
    assert (info.problem, info.format) == ("", kind)


def test_the_documentation_lists_the_formats() -> None:
    text = (Path(fastgan.__file__).parent.parent / "docs" / "data.md").read_text()
    listed = text.partition("The formats that are read are ")[2].partition("; of several")[0]
    found = re.findall(r"[A-Z]\w+(?: 2000)?", re.sub(r"\([^)]*\)", "", " ".join(listed.split())))
    assert sorted(found) == sorted({"WEBP": "WebP", "JPEG2000": "JPEG 2000"}.get(kind, kind) for kind in images.FORMATS)


def test_a_prepared_set_holds_its_own_encoding_only(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", noise(16, 16, 3))
    path = prepare(str(tmp_path / "photos"), tmp_path / "set", Settings(cache_to=8, lossless="png"), workers=1).path
    offset, length = np.load(path / "encoded" / "0016" / "offsets.npy")[0]
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "GIF")
    with (path / "encoded" / "0016" / "00000.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(out.getvalue().ljust(length, b"\0"))
    with pytest.raises(ArgumentError, match=images.UNREAD):
        open_source(str(path), 16).read(0, 16)


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


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "QOI", "PNG", "ICO", "ICNS", "GIF", "JPEG2000"])
def test_a_file_that_ends_in_zeros_is_refused(kind: str) -> None:
    """Its format has checksums or a mark at its end."""
    content = zeros_from_the_middle(encoded(kind))
    assert images.inspect_image(lambda: io.BytesIO(content), "x").problem
    with pytest.raises(Exception):  # noqa: B017  (Pillow's readers raise nearly any exception)
        images.decode(content, 16, 3)


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "BMP", "TGA", "PPM", "SGI", "PCX", "DDS"])
def test_zeros_that_may_be_pixels_are_used(kind: str) -> None:
    """These formats have neither: zeros decode to something, as any other bytes do."""
    content = zeros_from_the_middle(encoded(kind))
    assert images.inspect_image(lambda: io.BytesIO(content), "x").problem == ""
    images.decode(content, 16, 3)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow is built without AVIF")
def test_zeros_in_avif_are_used_or_refused_alike() -> None:
    """Its decoder tells of some."""
    content = zeros_from_the_middle(encoded("AVIF"))
    info = images.inspect_image(lambda: io.BytesIO(content), "x")
    with contextlib.nullcontext() if not info.problem else pytest.raises(Exception):
        images.decode(content, 16, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("behind", [b"", bytes(100), b"\xff\xda\xff\xc0 a video of the camera", photo()])
def test_what_is_behind_the_end_of_a_jpeg_does_not_matter(progressive: bool, behind: bytes) -> None:
    content = photo(progressive=progressive, exif=b"Exif\0\0" + photo()) + behind
    assert images.inspect_image(lambda: io.BytesIO(content), "x").problem == ""
    cut = content[: len(photo()) + 2000] + bytes(5000)  # behind the thumbnail, which has an end of its own
    assert images.inspect_image(lambda: io.BytesIO(cut), "x").problem


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


def test_threads_decode_large_images_one_after_the_other(tmp_path: Path) -> None:
    """Four small files of 134 MB of pixels each, in a process of its own, whose peak is told."""
    content = save(tmp_path / "0.png", np.zeros((5600, 6000, 3), np.uint8)).read_bytes()
    for i in range(1, 4):
        (tmp_path / f"{i}.png").write_bytes(content)
    assert len(content) < 200_000 and images.PIXELS_AT_ONCE < 5600 * 6000
    code = (
        "import resource, sys; from fastgan.data import images, open_source; images._readable();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "assert len(open_source(sys.argv[1], 16)) == 4; print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 250e6


@pytest.mark.parametrize(("kind", "left"), [("PNG", images.PIXELS_AT_ONCE - 128 * 128), ("ICO", 0), ("ICNS", 0)])
def test_an_icon_counts_as_the_largest_image(kind: str, left: int) -> None:
    """Its picture may be of 81 million pixels where it states 16 x 16."""
    with images.load_image(encoded(kind)):
        assert images._ROOM._free == left
    assert images._ROOM._free == images.PIXELS_AT_ONCE


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBa"])
@pytest.mark.parametrize("stored", ["I;16", "F", "P", "LA", "RGBA", "CMYK"])
def test_a_large_image_is_converted_as_a_small_one(monkeypatch: pytest.MonkeyPatch, stored: str, mode: str) -> None:
    image = Image.fromarray(noise(16, 16, 3))
    image = Image.fromarray(noise(16, 16, 1)[..., 0].astype(np.uint16) * 200) if stored == "I;16" else image
    image = image.convert("L").convert("F") if stored == "F" else image
    image = image if stored == "I;16" else image.convert(stored)
    if stored == "P":
        image.info["transparency"] = 3
    if "A" in stored:
        image.putalpha(Image.fromarray(noise(16, 16, 1)[..., 0]))
    whole = np.asarray(images.convert(image.copy(), mode))
    monkeypatch.setattr(images, "_BAND", 16 * 5)
    np.testing.assert_array_equal(np.asarray(images.convert(image, mode)), whole)
