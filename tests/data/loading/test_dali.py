"""DALI compared with Pillow, on the CPU. Skipped where DALI cannot be installed."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastgan.data
from fastgan.data import open_source
from fastgan.data.loading import dali
from fastgan.data.loading.pipeline import Pipeline
from fastgan.data.prepared.manifest import Manifest
from fastgan.errors import ArgumentError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DALI is for Linux only")

LIMIT = 1.5  # mean absolute difference of 255


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A synthetic photograph: each scale has 0.6 of the contrast of the next coarser one; colors are correlated."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(2, 8):
        noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) * 0.6**octave
    total = 0.3 * total + 0.7 * total.mean(axis=2, keepdims=True)
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def both(spec: str, resolution: int, target: int, channels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first images by DALI and by Pillow: int [N, C, r, r] of 0 to 255."""
    source = open_source(spec, target, channels)
    out = []
    for kind in ("dali", "torch"):
        with fastgan.data.open(source, resolution, len(source), pipeline=kind, workers=2) as pipeline:  # type: ignore[arg-type]
            out.append(((next(pipeline).images.numpy() + 1) * 127.5).round().astype(int))
    return out[0], out[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger, smaller and just as large as the target, square and not."""
    path = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate([(128, 128), (96, 150), (211, 99), (64, 64), (64, 80), (40, 33), (600, 500)]):
        picture(height, width, i).save(path / f"{i}.jpg", quality=90)
        picture(height, width, i).save(path / f"{i}.png")
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [64, 16])
def test_agrees_with_pillow_on_files(folder: Path, resolution: int, channels: int) -> None:
    """Crop, antialiased resize and area average, image by image."""
    ours, pillow = both(f"folder:{folder}", resolution, 64, channels)
    assert ours.shape == (14, channels, resolution, resolution)
    assert np.abs(ours - pillow).mean(axis=(1, 2, 3)).max() < LIMIT
    # Not because the pictures are all alike:
    assert np.abs(ours - np.roll(pillow, 2, axis=0)).mean() > 10 * LIMIT


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoding", ["jpeg", "png", "webp"])
def test_agrees_with_pillow_on_a_prepared_set(
    tmp_path: Path, prepared_set: Callable[..., Manifest], encoding: str, channels: int
) -> None:
    mode = "L" if channels == 1 else "RGB"
    pixels = np.stack([np.asarray(picture(32, 32, i).convert(mode)).reshape(32, 32, channels) for i in range(7)])
    prepared_set(tmp_path, pixels.transpose(0, 3, 1, 2), cache_to=8, encoding=encoding)
    for resolution in (32, 16):
        ours, pillow = both(str(tmp_path), resolution, 32)
        assert np.abs(ours - pillow).mean() < LIMIT
    # The set holds 8 px decoded; DALI makes them from the files of 16 px.
    ours, cached = both(str(tmp_path), 8, 32)
    assert np.abs(ours - cached).mean() < LIMIT


def save_all(path: Path) -> None:
    """Write every format and mode that `SAME_AS_PILLOW` lists, and images rotated by EXIF."""
    image = picture(16, 24)  # cropped and not resized: what is compared is decoding
    upright = Image.Exif()
    upright[0x0112] = 6
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        image.save(path / f"rgb.{suffix}", kind)
    image.save(path / "rgb.mpo", save_all=True, append_images=[image])
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png")):
        image.convert("L").save(path / f"gray.{suffix}", kind)
    image.convert("P").save(path / "palette.png")
    image.save(path / "progressive.jpg", progressive=True)
    image.save(path / "444.jpg", subsampling=0)
    for suffix in ("jpg", "png", "webp"):
        image.save(path / f"turned.{suffix}", exif=upright.tobytes())


def test_formats(tmp_path: Path) -> None:
    save_all(tmp_path)
    source = open_source(f"folder:{tmp_path}", 16)
    encoded = source.encoded(16)
    assert encoded is not None
    named = {(kind, mode) for kind, mode, _ in encoded.kinds}
    assert named == {(kind, mode) for kind, modes in dali.SAME_AS_PILLOW.items() for mode in modes}
    ours, pillow = both(f"folder:{tmp_path}", 16, 16, 3)
    assert np.abs(ours - pillow).mean(axis=(1, 2, 3)).max() < LIMIT


@pytest.mark.parametrize(
    ("mode", "file", "words"),
    [
        ("RGBA", "a.png", "a.png, a PNG image of mode RGBA"),
        ("I;16", "a.png", "a PNG image of mode I;16"),
        ("RGB", "a.gif", "a GIF image of mode"),
        ("CMYK", "a.jpg", "a JPEG image of mode CMYK"),
        ("RGB", "a.bmp", "a BMP image of mode RGB"),
        ("L", "a.pgm", "a PPM image of mode L"),
        ("RGB", "a.tif", "a TIFF image of mode RGB"),
        ("1", "a.png", "a PNG image of mode 1"),
        ("transparent", "a.png", "with transparency"),
    ],
)
def test_files_dali_decodes_differently_are_left_to_pillow(tmp_path: Path, mode: str, file: str, words: str) -> None:
    image = picture(16, 16)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    options: dict[str, Any] = {"transparency": (0, 0, 0)} if mode == "transparent" else {}
    (image.convert(mode) if mode in ("RGBA", "CMYK", "L", "1") else image).save(tmp_path / file, **options)
    picture(16, 16).save(tmp_path / "b.jpg")
    source = open_source(f"folder:{tmp_path}", 16)
    with pytest.raises(ArgumentError, match="--pipeline must be auto or torch, got 'dali'") as error:
        fastgan.data.open(source, 16, pipeline="dali")
    assert words in str(error.value)
    with fastgan.data.open(source, 16, resident_bytes=0) as pipeline:
        assert pipeline.kind[0] == "torch" and words in pipeline.describe()


def test_a_gray_tiff_of_4_bits_is_left_to_pillow(tmp_path: Path) -> None:
    """Its mode is L, as at 8 bits, and DALI stops at it."""
    tags = [(256, 4, 16), (257, 4, 16), (258, 3, 4), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (278, 4, 16)]
    tags.append((279, 4, 128))
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in tags)
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes([0x0F] * 128)
    (tmp_path / "a.tif").write_bytes(file)
    picture(16, 16).save(tmp_path / "b.jpg")
    source = open_source(f"folder:{tmp_path}", 16, 1)
    with fastgan.data.open(source, 16, batch=2, resident_bytes=0, workers=1) as pipeline:
        assert pipeline.kind[0] == "torch"
        assert sorted(np.unique(next(pipeline).images.numpy()))[0] == -1
    assert set(np.unique(source.read(0, 16))) == {0, 255}


def test_small_pngs_of_2_and_4_bits_are_decoded_as_pillow_does(tmp_path: Path) -> None:
    for bits in (2, 4):
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2**bits).convert("P").save(
            tmp_path / f"{bits}.png", bits=bits
        )
        rows = b"".join(b"\0" + bytes([0x1B] * (2 * bits)) for _ in range(16))
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        ]
        parts = [
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        ]
        (tmp_path / f"gray{bits}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    ours, pillow = both(f"folder:{tmp_path}", 16, 16, 3)
    assert np.abs(ours - pillow).mean(axis=(1, 2, 3)).max() < LIMIT


def test_an_output_stays_while_later_batches_are_decoded(tmp_path: Path) -> None:
    """The next batch is decoded while this one is used, whose memory belongs to DALI."""
    contents = []
    for i in range(6):
        Image.new("L", (64, 64), 40 * i).save(tmp_path / f"{i}.png")
        contents.append(np.frombuffer((tmp_path / f"{i}.png").read_bytes(), dtype=np.uint8))
    encoded = open_source(f"folder:{tmp_path}", 64).encoded(64)
    assert encoded is not None
    graph = dali.build_pipeline(encoded, 1, torch.device("cpu"), 8, 2)
    batches = []
    for content in contents:
        graph.feed_input("files", [content] * 8)
        (images,) = graph.run()
        batches.append(torch.from_dlpack(images.as_tensor()))
        del images
    for i, images in enumerate(batches):
        assert torch.equal(images, torch.full_like(images, 40 * i))


def auto(folder: Path, resolution: int = 32) -> Pipeline:
    return fastgan.data.open(f"folder:{folder}", resolution, resident_bytes=0, target=32)


def test_auto_selects_dali_and_suggests_prepare(folder: Path) -> None:
    with auto(folder) as pipeline:
        assert pipeline.kind[0] == "dali" and "fastgan prepare" not in pipeline.describe()
        pipeline.set_resolution(4)
        assert "decoded at 32 px every time, which `fastgan prepare` avoids" in pipeline.describe()


def test_auto_selects_torch_without_dali(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with auto(folder) as pipeline:
        assert pipeline.kind[0] == "torch"
        assert "DALI is not installed (pip install 'fastgan[dali]')" in pipeline.describe()
    with pytest.raises(ArgumentError, match=r"must be auto or torch, got 'dali'; .*pip install 'fastgan\[dali\]'"):
        fastgan.data.open(f"folder:{folder}", 32, pipeline="dali")


def test_auto_selects_torch_on_other_systems_than_linux(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with auto(folder) as pipeline:
        assert pipeline.kind[0] == "torch" and "DALI is available on Linux only" in pipeline.describe()


def test_a_file_damaged_after_opening_is_named(tmp_path: Path) -> None:
    for i in range(4):
        picture(32, 32, i).save(tmp_path / f"{i}.jpg")
    with fastgan.data.open(f"folder:{tmp_path}", 32, 4, pipeline="dali") as pipeline:
        whole = (tmp_path / "2.jpg").read_bytes()
        (tmp_path / "2.jpg").write_bytes(whole[: whole.index(b"\xff\xda") + 20])  # it still says what it holds
        with pytest.raises(ArgumentError, match=r"2\.jpg.*cannot be decoded") as error:
            next(pipeline)
        assert error.value.__cause__ is not None and error.value.__cause__.__traceback__ is None
        store = pipeline._store
        assert isinstance(store, dali.DaliStore)
        pending = [part for parts in store._prefetcher.pending.values() for part in parts]
        assert pending and all(part.exception() is not None for part in pending)
        assert store._dali_pipeline is None  # unusable after an error
        (tmp_path / "2.jpg").unlink()
        with pytest.raises(ArgumentError, match=r"2\.jpg"):
            next(pipeline)
        (tmp_path / "2.jpg").write_bytes(whole)
        assert next(pipeline).images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("content", [b"", bytes(3000), b"\xff\xd8\xff\xe0" + bytes(3000)])
def test_files_that_stop_being_images_are_named(tmp_path: Path, content: bytes) -> None:
    """All files of a batch: two are enough for DALI to end the process."""
    for i in range(8):
        picture(32, 32, i).save(tmp_path / f"{i}.jpg")
    with fastgan.data.open(f"folder:{tmp_path}", 32, 8, pipeline="dali") as pipeline:
        for i in range(8):
            (tmp_path / f"{i}.jpg").write_bytes(content)
        with pytest.raises(ArgumentError, match=r"\d\.jpg': the image cannot be decoded"):
            next(pipeline)
