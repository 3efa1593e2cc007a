from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import celeba, cifar10, noise, save

from fastgan.data import open_source
from fastgan.data.images import area_average, pyramid
from fastgan.errors import ArgumentError


def refusal(spec: str, resolution: int = 16, channels: int | None = None) -> str:
    with pytest.raises(ArgumentError) as error:
        open_source(spec, resolution, channels)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_digits() -> None:
    source = open_source("digits", 16)
    assert (len(source), source.channels, source.num_classes, source.name) == (1797, 1, 10, "digits")
    assert source.labels is not None and source.labels.dtype == np.int64
    assert set(source.labels) == set(range(10))
    image = source.read(0, 16)
    assert (image.dtype, image.shape) == (np.uint8, (1, 16, 16))
    assert image.min() == 0 and image.max() > 230


def test_digits_at_their_own_size_are_the_stored_values() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits", 8)
    np.testing.assert_array_equal(source.read(5, 8)[0], np.rint(load_digits().images[5] * 255 / 16))


def test_lower_resolution_is_the_mean_of_the_target() -> None:
    source = open_source("synthetic", 32)
    full = source.read(3, 32).astype(np.float64)
    for resolution in (4, 8, 16):
        block = 32 // resolution
        mean = full.reshape(3, resolution, block, resolution, block).mean(axis=(2, 4))
        np.testing.assert_array_equal(source.read(3, resolution), np.floor(mean + 0.5))


def test_area_average_keeps_the_extremes() -> None:
    """The integer sums do not overflow, and rounding stays in the range."""
    for value in (0, 1, 254, 255):
        assert (area_average(np.full((2, 1, 512, 512), value, np.uint8), 4) == value).all()
        assert (area_average(np.full((64, 64), value, np.uint8), 4) == value).all()


def test_pyramid_is_the_area_average_of_each_resolution() -> None:
    image = noise(3, 128, 128)
    levels = pyramid(image, [4, 16, 64, 128])
    assert sorted(levels) == [4, 16, 64, 128]
    for resolution, level in levels.items():
        block = 128 // resolution
        mean = image.reshape(3, resolution, block, resolution, block).mean(axis=(2, 4))
        np.testing.assert_array_equal(level, np.floor(mean + 0.5))


@pytest.mark.parametrize("resolution", [0, 2, 12, 32, -4])
def test_read_refuses_resolution(resolution: int) -> None:
    source = open_source("digits", 16)
    with pytest.raises(ArgumentError, match="power of two from 4 to 16"):
        source.read(0, resolution)


def test_read_refuses_index() -> None:
    source = open_source("digits", 8)
    for index in (-1, 1797):
        with pytest.raises(IndexError):
            source.read(index, 8)


def test_synthetic_depends_on_seed() -> None:
    one, same, other = (open_source("synthetic", 16, seed=seed) for seed in (1, 1, 2))
    assert (len(one), one.channels, one.num_classes) == (2048, 3, 10)
    np.testing.assert_array_equal(one.read(7, 16), same.read(7, 16))
    assert (one.read(7, 16) != other.read(7, 16)).any()
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert open_source("synthetic", 8, channels=1).read(0, 8).shape == (1, 8, 8)


@pytest.mark.parametrize("spec", ["", "imagenet", "digits:x", "synthetic:", "folder:", "folder", "cifar10:"])
def test_unknown_spec(spec: str) -> None:
    assert "--data must be digits, stacked-digits, avatars, fashion-mnist, a folder of images" in refusal(spec)


def test_resolution_must_be_a_power_of_two() -> None:
    for resolution in (0, 2, 24, -8):
        assert "--resolution" in refusal("digits", resolution)


def test_channel_mismatch(tmp_path: Path) -> None:
    assert refusal("digits", channels=3) == "--channels must be 1, got 3; digits has 1 channel"
    assert "cifar10 has 3 channels" in refusal(f"cifar10:{tmp_path}", channels=1)
    assert "mnist has 1 channel" in refusal(f"mnist:{tmp_path}", channels=3)
    assert "celeba has 3 channels" in refusal(f"celeba:{tmp_path}", channels=1)
    assert "--channels" in refusal("synthetic", channels=0)
    assert "--channels must be 1, 3 or 4, got 2" in refusal(f"folder:{tmp_path}", channels=2)


def test_folder_of_all_sorts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "b" / "deep" / "x.png")
    save(tmp_path / "b.JPG", noise(30, 40, 3))
    save(tmp_path / "a.gif", noise(24, 24))
    save(tmp_path / "c" / "rgba.webp", noise(20, 20, 4))
    save(tmp_path / "c" / "gray16.png", noise(20, 20).astype(np.uint16) * 257)
    Image.fromarray(noise(20, 20, 3)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(noise(20, 20, 3)).convert("P").save(tmp_path / "palette.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / ".hidden.png").write_bytes(b"")
    whole = save(tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    source = open_source(f"folder:{tmp_path}", 16)
    assert (len(source), source.channels, source.labels, source.num_classes) == (8, 3, None, 0)
    skipped = dict(source.skipped)
    assert set(skipped) == {"notes.txt", "empty.png", "cut.png"}
    assert all(skipped.values())
    for index in range(len(source)):
        image = source.read(index, 16)
        assert (image.shape, image.dtype) == ((3, 16, 16), np.uint8)
        assert image.std() > 5
    assert not caplog.records


def test_cut_jpeg_is_skipped(tmp_path: Path) -> None:
    data = save(tmp_path / "a.jpg", noise(64, 64, 3)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "more.jpg").write_bytes(data + bytes(5000))
    source = open_source(f"folder:{tmp_path}", 16)
    assert [file for file, _ in source.skipped] == ["cut.jpg"]
    np.testing.assert_array_equal(source.read(0, 16), source.read(1, 16))


@pytest.mark.parametrize("kind", ["bmp", "gif", "tiff", "ppm", "tga", "png", "webp"])
def test_cut_file_of_any_kind_is_skipped(tmp_path: Path, kind: str) -> None:
    """Most of Pillow's readers detect a truncated file only while decoding, which would stop a run later."""
    data = save(tmp_path / f"a.{kind}", noise(64, 64, 3)).read_bytes()
    (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) * 9 // 10])
    source = open_source(f"folder:{tmp_path}", 16)
    assert [file for file, _ in source.skipped] == [f"cut.{kind}"]
    assert len(source) == 1


def test_file_damaged_after_opening_is_named(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}", 16)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ArgumentError, match=r"a\.png"):
        source.read(0, 16)


def test_folder_labels_are_first_level_subfolders(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/sub/3.png", "ant/4.png"):
        save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", 16)
    assert source.num_classes == 3
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 2])
    save(tmp_path / "loose.png")
    assert open_source(f"folder:{tmp_path}", 16).labels is None


def test_folder_fingerprint_follows_the_data_not_its_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        save(tmp_path / place / "x.png")
        save(tmp_path / place / "y.png", noise(20, 20, 3, seed=1))
    one, two = (open_source(f"folder:{tmp_path / place}", 16) for place in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    for name in ("x.bmp", "y.bmp"):  # all of one size
        os.utime(save(tmp_path / "bmp" / name, noise(20, 20, 3, seed=int(name == "y.bmp"))), (0, 0))
    before = open_source(f"folder:{tmp_path / 'bmp'}", 16).fingerprint
    os.utime(tmp_path / "bmp" / "x.bmp")
    assert open_source(f"folder:{tmp_path / 'bmp'}", 16).fingerprint == before
    shutil.copy(tmp_path / "bmp" / "y.bmp", tmp_path / "bmp" / "x.bmp")
    assert open_source(f"folder:{tmp_path / 'bmp'}", 16).fingerprint != before
    (tmp_path / "two" / "y.png").rename(tmp_path / "two" / "z.png")
    assert open_source(f"folder:{tmp_path / 'two'}", 16).fingerprint != one.fingerprint


def test_folder_links_in_a_circle(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    assert len(open_source(f"folder:{tmp_path / 'data'}", 16)) == 1


def test_a_broken_link_is_listed_and_no_other_file_is_skipped(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a" / "x.png")
    save(tmp_path / "data" / "b" / "y.png")
    (tmp_path / "data" / "a" / "itself.png").symlink_to("itself.png")
    source = open_source(f"folder:{tmp_path / 'data'}", 16)
    assert (len(source), source.num_classes, source.skipped) == (2, 2, [("a/itself.png", "a link that leads nowhere")])


def test_unusable_folders(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert f"{missing} is missing" in refusal(f"folder:{missing}")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(f"folder:{tmp_path / 'file'}")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    text = refusal(f"folder:{tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in text and "is empty" in text
    (tmp_path / "broken").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "broken" / name).write_bytes(b"garbage")
    text = refusal(f"folder:{tmp_path / 'broken'}")
    assert str(tmp_path / "broken") in text and "none of the 2 files" in text and "a.jpg" in text


def test_folder_channels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(16, 16))
    save(tmp_path / "b.png", noise(16, 16).astype(np.uint16) * 257)
    gray = open_source(f"folder:{tmp_path}", 16)
    assert gray.channels == 1
    color = open_source(f"folder:{tmp_path}", 16, channels=3).read(0, 16)
    np.testing.assert_array_equal(color, np.repeat(gray.read(0, 16), 3, axis=0))
    save(tmp_path / "c.png", noise(16, 16, 3))
    assert open_source(f"folder:{tmp_path}", 16).channels == 3
    assert open_source(f"folder:{tmp_path}", 16, channels=1).read(2, 16).shape == (1, 16, 16)


def test_conversions_keep_the_values(tmp_path: Path) -> None:
    gray = noise(16, 16)
    gray[0, 0] = 255
    for order in ("<u2", ">u2"):
        save(tmp_path / f"{order[1:]}{ord(order[0])}.tif", gray.astype(order) * 257)
    save(tmp_path / "v8.png", gray)
    save(tmp_path / "v16.png", gray.astype(np.uint16) * 257)
    save(tmp_path / "v32.tif", gray.astype(np.int32) * 257)
    save(tmp_path / "vf.tif", gray.astype(np.float32))
    save(tmp_path / "vf infinite.tif", np.where(gray == 255, np.inf, gray).astype(np.float32))
    source = open_source(f"folder:{tmp_path}", 16)
    assert len(source) == 7
    for index in range(7):
        np.testing.assert_array_equal(source.read(index, 16)[0], gray)


def test_transparent_becomes_white(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[8:, :, 3] = 255
    save(tmp_path / "a.png", pixels)
    gray = Image.fromarray(pixels).convert("LA")
    gray.save(tmp_path / "b.png")
    palette = Image.fromarray(np.repeat(np.array([[0], [1]], np.uint8), 8, axis=0).repeat(16, axis=1))
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.save(tmp_path / "c.png", transparency=0)
    deep = np.repeat(np.array([[7], [0]], np.uint16), 8, axis=0).repeat(16, axis=1)
    Image.fromarray(deep).save(tmp_path / "d.png", transparency=7)
    source = open_source(f"folder:{tmp_path}", 16)
    for index in range(4):
        image = source.read(index, 16)
        assert (image[:, :8] == 255).all() and (image[:, 8:] == 0).all()


def test_center_square(tmp_path: Path) -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = noise(16, 16)
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", np.ascontiguousarray(wide.T))
    source = open_source(f"folder:{tmp_path}", 16)
    np.testing.assert_array_equal(source.read(0, 16)[0], wide[:, 16:32])
    np.testing.assert_array_equal(source.read(1, 16)[0], wide[:, 16:32].T)


def test_center_square_of_a_larger_image(tmp_path: Path) -> None:
    """Except the edges, where the filter may use pixels outside of the square."""
    wide = noise(64, 192)
    save(tmp_path / "a.png", wide)
    found = open_source(f"folder:{tmp_path}", 16).read(0, 16)[0]
    square = Image.fromarray(np.ascontiguousarray(wide[:, 64:128]))
    expected = np.asarray(square.resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(found[:, 3:-3], expected[:, 3:-3])


def test_exif_orientation(tmp_path: Path) -> None:
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    save(tmp_path / "a.png", pixels, exif=exif)
    np.testing.assert_array_equal(open_source(f"folder:{tmp_path}", 16).read(0, 16)[0], np.rot90(pixels, -1))


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    """Stripes one pixel wide become an even gray; taking every n-th pixel would give black or white."""
    stripes = np.tile(np.array([[0, 255]], np.uint8), (256, 128))
    save(tmp_path / "a.png", stripes)
    save(tmp_path / "b.jpg", stripes, quality=95)
    source = open_source(f"folder:{tmp_path}", 16)
    for index in range(2):
        np.testing.assert_allclose(source.read(index, 16)[:, :, 1:-1], 127.5, atol=12)


def test_large_jpeg_is_decoded_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import JpegImagePlugin

    ramp = np.linspace(0, 255, 512).astype(np.uint8)[None].repeat(512, axis=0)
    save(tmp_path / "a.jpg", ramp, quality=95)
    sizes = []
    load = JpegImagePlugin.JpegImageFile.load

    def spy(self: JpegImagePlugin.JpegImageFile) -> object:
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", spy)
    image = open_source(f"folder:{tmp_path}", 16).read(0, 16)
    assert sizes[0] == (64, 64)
    np.testing.assert_allclose(image[0], ramp.reshape(16, 32, 16, 32).mean(axis=(1, 3)), atol=4)


def test_enlarging_logs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "a.png", noise(8, 9, 3))
    save(tmp_path / "b.png", noise(10, 30, 3))
    save(tmp_path / "c.png", noise(64, 64, 3))
    source = open_source(f"folder:{tmp_path}", 32)
    assert source.read(0, 32).shape == (3, 32, 32)
    (record,) = caplog.records
    assert "2 of 3 images are smaller than 32 px" in record.getMessage()
    assert "9 x 8" in record.getMessage()


@pytest.mark.parametrize("inner", ["cifar-10-batches-bin", "."])
def test_cifar10(tmp_path: Path, inner: str) -> None:
    records = cifar10(tmp_path / "root" / inner)
    source = open_source(f"cifar10:{tmp_path / 'root'}", 32)
    assert (len(source), source.channels, source.num_classes) == (20, 3, 10)
    np.testing.assert_array_equal(source.labels, records[:, 0])
    for index in (0, 19):
        np.testing.assert_array_equal(source.read(index, 32), records[index, 1:].reshape(3, 32, 32))
    assert source.read(0, 4).shape == (3, 4, 4)


def test_cifar10_unusable(tmp_path: Path) -> None:
    assert "binary version" in refusal(f"cifar10:{tmp_path}")
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "nothing is unpickled" in refusal(f"cifar10:{tmp_path}")
    place = tmp_path / "cifar-10-batches-bin"
    cifar10(place)
    (place / "data_batch_3.bin").write_bytes(bytes(3072))
    assert "3073 bytes" in refusal(f"cifar10:{tmp_path}")
    (place / "data_batch_3.bin").write_bytes(b"\x0b" + bytes(3072))
    assert "label of 0 to 9" in refusal(f"cifar10:{tmp_path}")
    (place / "data_batch_3.bin").unlink()
    assert "missing: data_batch_3.bin" in refusal(f"cifar10:{tmp_path}")


def test_celeba_missing(tmp_path: Path) -> None:
    text = refusal(f"celeba:{tmp_path}")
    assert str(tmp_path / "celeba") in text
    assert "missing: img_align_celeba" in text and "list_eval_partition.txt" in text


def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CelebA

    celeba(tmp_path / "celeba")
    assert "differs from the published" in refusal(f"celeba:{tmp_path}")
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)  # the published md5 sums
    source = open_source(f"celeba:{tmp_path}", 32)
    assert (len(source), source.channels, source.labels, source.num_classes) == (3, 3, None, 0)
    assert source.read(2, 8).shape == (3, 8, 8)
    (tmp_path / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    assert "000002.jpg" in refusal(f"celeba:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("synthetic", "PIL.Image", "pillow"),
        ("celeba", "torchvision.datasets", "torchvision"),
    ],
)
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    place = f":{tmp_path}" if spec == "celeba" else ""
    assert f"it needs {package}, which cannot be imported" in refusal(spec + place)


def test_stacked_digits_are_three_digits_with_the_label_of_all_three() -> None:
    stacked, digits = open_source("stacked-digits", 16, seed=3), open_source("digits", 16)
    assert (len(stacked), stacked.channels, stacked.num_classes) == (60_000, 3, 1000)
    assert digits.labels is not None and stacked.labels is not None
    singles = {digits.read(i, 16).tobytes(): int(label) for i, label in enumerate(digits.labels)}
    for index in (0, 1, 59_999):
        image = stacked.read(index, 16)
        assert image.shape == (3, 16, 16)
        first, second, third = (singles[plane.tobytes()] for plane in image)
        assert stacked.labels[index] == 100 * first + 10 * second + third
    assert np.array_equal(stacked.read(7, 8), np.stack([area_average(plane, 8) for plane in stacked.read(7, 16)]))
    counts = np.bincount(stacked.labels, minlength=1000)
    assert counts.min() > 20 and counts.max() < 120  # 60 are expected


def test_stacked_digits_follow_the_seed() -> None:
    one, same, other = (open_source("stacked-digits", 8, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert np.array_equal(one.read(5, 8), same.read(5, 8))
    assert one.labels is not None and other.labels is not None and (one.labels != other.labels).mean() > 0.99
    with pytest.raises(ArgumentError, match="--channels must be 3, got 1; stacked-digits has 3 channels"):
        open_source("stacked-digits", 16, channels=1)


@pytest.mark.parametrize("spec", ["photos.zip", "zip:photos.zip", "x-{000..099}.tar", "tar:shards", "photos.tar.gz"])
def test_an_archive_is_prepared_first(spec: str) -> None:
    with pytest.raises(ArgumentError, match=r"fastgan prepare \S+ SET`, then use --data SET") as error:
        open_source(spec, 16)
    assert f"fastgan prepare {spec} SET" in str(error.value)
