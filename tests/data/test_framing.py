"""Images of any shape and with transparency: --fit, --background, --channels 4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import mnist, noise, save

from fastgan.data import Pipeline, open_source
from fastgan.data.framing import Framing
from fastgan.data.sheets import save_sheet, sheet, straight_alpha
from fastgan.errors import ArgumentError

RED, CLEAR = (255, 0, 0, 255), (0, 255, 0, 0)


def sticker(path: Path, side: int = 64) -> Path:
    """A red disc on a clear ground whose hidden color is green."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    pixels = np.where((x**2 + y**2 < (0.4 * side) ** 2)[..., None], RED, CLEAR).astype(np.uint8)
    return save(path, pixels)


def test_pad_and_stretch(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 200
    save(tmp_path / "a.png", pixels)
    crop, pad, stretch = (open_source(str(tmp_path), 32, fit=fit) for fit in ("crop", "pad", "stretch"))
    padded = pad.read(0, 32)
    assert (padded[:, :8] == 255).all() and (padded[:, 24:] == 255).all()
    np.testing.assert_array_equal(padded[:, 8:24], pixels.transpose(2, 0, 1))
    stretched = stretch.read(0, 32)
    assert (stretched[:, :, :14] == 0).all() and (stretched[:, :, 18:] == 200).all()
    assert (crop.read(0, 32)[:, :, 20:] == 200).all()
    assert len({one.fingerprint for one in (crop, pad, stretch)}) == 3


def test_padding_has_the_color_of_the_background(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((8, 16, 3), np.uint8))
    color = open_source(str(tmp_path), 16, fit="pad", background="rgb(10, 20, 30)").read(0, 16)
    assert color[:, 0, 0].tolist() == [10, 20, 30]
    gray = open_source(str(tmp_path), 16, 1, fit="pad", background="#808080").read(0, 16)
    assert gray[0, 0, 0] == 128
    clear = open_source(str(tmp_path), 16, 4, fit="pad").read(0, 16)
    assert (clear[:, 0] == 0).all() and (clear[3, 8] == 255).all()


def test_alpha_is_put_on_the_background(tmp_path: Path) -> None:
    sticker(tmp_path / "a.png")
    for name, color in (("white", [255, 255, 255]), ("black", [0, 0, 0]), ("#0000ff", [0, 0, 255])):
        image = open_source(str(tmp_path), 16, background=name).read(0, 16)
        assert image[:, 0, 0].tolist() == color
        assert image[:, 8, 8].tolist() == [255, 0, 0]


def test_rgba_is_premultiplied_and_hidden_colors_do_not_bleed(tmp_path: Path) -> None:
    sticker(tmp_path / "a.png")
    source = open_source(str(tmp_path), 16, 4)
    image = source.read(0, 16)
    assert source.channels == 4 and image.shape == (4, 16, 16)
    assert (image[1:3] == 0).all()  # the green of the clear parts is gone
    assert (image[0] == image[3]).all() and set(np.unique(image[3])) > {0, 255}
    mean = source.read(0, 8)
    np.testing.assert_array_equal(mean, (image.reshape(4, 8, 2, 8, 2).astype(int).sum((2, 4)) + 2) // 4)


@pytest.mark.parametrize("kind", ["palette", "LA", "gray16", "rgb", "gray"])
def test_every_kind_of_image_becomes_rgba(tmp_path: Path, kind: str) -> None:
    half = np.repeat(np.array([[0], [1]], np.uint8), 8, axis=0).repeat(16, axis=1)
    if kind == "palette":
        image = Image.fromarray(half)
        image.putpalette([9, 9, 9, 200, 200, 200])
        image.save(tmp_path / "a.png", transparency=0)
    elif kind == "LA":
        image = Image.fromarray(half * 200)
        image.putalpha(Image.fromarray(half * 255))
        image.save(tmp_path / "a.png")
    elif kind == "gray16":
        Image.fromarray(np.where(half == 1, 200 * 257, 7).astype(np.uint16)).save(tmp_path / "a.png", transparency=7)
    else:
        flat = np.full((16, 16, 3) if kind == "rgb" else (16, 16), 200, np.uint8)
        save(tmp_path / "a.png", flat)
    image = open_source(str(tmp_path), 16, 4).read(0, 16)
    assert (image[:3, 8:] == 200).all() and (image[3, 8:] == 255).all()
    clear = kind in ("palette", "LA", "gray16")
    assert (image[:, :8] == 0).all() if clear else (image[3] == 255).all()


@pytest.mark.parametrize("mode", ["1", "LAB", "CMYK", "I", "I;16", "F"])
def test_every_mode_has_the_same_colors_in_rgba(tmp_path: Path, mode: str) -> None:
    if mode in ("I", "I;16", "F"):
        values = np.arange(256).reshape(16, 16) * (1 if mode == "F" else 257)
        image = Image.fromarray(values.astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    else:
        shape = (16, 16) if mode == "1" else (16, 16, 4 if mode == "CMYK" else 3)
        image = Image.fromarray(noise(*shape)).convert(mode) if mode == "1" else Image.fromarray(noise(*shape), mode)
    assert image.mode == mode
    image.save(tmp_path / "a.tif")
    color, rgba = (open_source(str(tmp_path), 16, channels).read(0, 16) for channels in (3, 4))
    np.testing.assert_array_equal(rgba[:3], color)
    assert (rgba[3] == 255).all() and len(np.unique(color)) > 1


def test_a_run_says_how_many_images_have_alpha(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert open_source(str(tmp_path), 16).notes == []
    sticker(tmp_path / "b.png")
    assert open_source(str(tmp_path), 16, background="gray").notes == [
        "1 of 2 images have alpha: they are put on gray (--background); --channels 4 trains transparency"
    ]
    assert open_source(str(tmp_path), 16, 4).notes == ["1 of 2 images have alpha, which is trained as a fourth channel"]


def test_other_kinds_say_that_framing_has_no_effect(tmp_path: Path) -> None:
    mnist(tmp_path)
    assert open_source(str(tmp_path), 16, fit="pad").notes == [
        "--fit and --background have no effect on the images of mnist"
    ]
    assert open_source("digits", 16).notes == ()


@pytest.mark.parametrize(
    ("framing", "flag"), [(Framing(background="whitish"), "--background"), (Framing(fit="shrink"), "--fit")]
)
def test_framing_is_checked(tmp_path: Path, framing: Framing, flag: str) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(ArgumentError, match=flag):
        open_source(str(tmp_path), 16, fit=framing.fit, background=framing.background)


def test_dali_is_not_used_for_padding_or_rgba(tmp_path: Path) -> None:
    from fastgan.data.loading.dali import unsupported_reason

    save(tmp_path / "a.png", noise(20, 20, 3))
    assert unsupported_reason(open_source(str(tmp_path), 16, fit="pad"), 16)
    assert unsupported_reason(open_source(str(tmp_path), 16, 4), 16)


def test_batches_of_rgba(tmp_path: Path) -> None:
    for i in range(3):
        sticker(tmp_path / f"{i}.png", 32 + i)
    source = open_source(str(tmp_path), 16, 4)
    for kind in ("cache", "torch"):
        with Pipeline(source, 16, 2, mirror=True, pipeline=kind) as pipeline:
            images = next(pipeline).images
        assert images.shape == (2, 4, 16, 16)
        assert images[:, 3].max() == 1 and images[:, 0, 0, 0].max() == -1


def test_a_sheet_of_rgba_is_a_transparent_png(tmp_path: Path) -> None:
    sticker(tmp_path / "in" / "a.png")
    pixels = open_source(str(tmp_path / "in"), 16, 4).read(0, 16)[None]
    save_sheet(pixels, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.mode == "RGBA" and image.size == (64, 64)
        assert image.getpixel((0, 0)) == (0, 0, 0, 0)
        assert image.getpixel((32, 32)) == RED
        edge = np.asarray(image)[np.asarray(image)[..., 3] > 0]
        assert (edge[:, 0] == 255).all()  # divided by alpha, the edge is as red as the disc


def test_straight_alpha_of_what_a_generator_may_make() -> None:
    """Colors above alpha, which no premultiplied image has, are cut; alpha 0 is black."""
    pixels = np.array([[200, 50, 0], [100, 0, 0], [0, 0, 0], [100, 100, 0]], np.uint8)[:, :, None]
    assert straight_alpha(pixels)[:, :, 0].T.tolist() == [[255, 255, 0, 100], [128, 0, 0, 100], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("side", "size", "shown"), [(4, None, 64), (16, None, 64), (28, None, 84), (64, None, 64), (8, 128, 128)]
)
def test_small_images_are_enlarged_by_whole_factors(tmp_path: Path, side: int, size: int | None, shown: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, side, side), np.uint8)
    save_sheet(pixels, tmp_path / "sheet.png", size=size)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (2 * shown, 2 * shown)
        first = np.asarray(image)[:shown, :shown]
    assert np.array_equal(first, pixels[0, 0].repeat(shown // side, 0).repeat(shown // side, 1))


def test_sheet_with_labels(tmp_path: Path) -> None:
    pixels = np.zeros((3, 3, 8, 8), np.uint8)
    labels = ["a", "line\nfeed and much more text than fits", ""]
    save_sheet(pixels, tmp_path / "a.png", columns=2, labels=labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (128, 2 * (64 + 14))
        strip = np.asarray(image)[64:78]
        assert (strip[:, :64] < 128).any() and (strip[:, 64:] < 128).any()
        assert (np.asarray(image)[-14:, :64] == 255).all()
    assert sheet(pixels, columns=2).shape == (16, 16, 3)
