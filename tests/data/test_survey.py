"""What a sample of a source's images says of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastgan.data import open_source
from fastgan.data.survey import asymmetry, survey


def write(folder: Path, count: int, size: tuple[int, int], mode: str = "RGB", suffix: str = "png") -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
        Image.fromarray(pixels.squeeze(), mode).save(folder / f"{i}.{suffix}")
    return folder


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    found = survey(open_source(f"folder:{write(tmp_path / 'p', 12, (90, 60), suffix='jpg')}", 16))
    assert (found.count, found.side, found.channels, found.aspect) == (12, 60, 3, 1.5)
    assert (found.alpha, found.gray, found.num_classes) == (0.0, False, 0)


def test_alpha_counts_where_something_is_transparent(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", 3, (20, 20), "RGBA")
    for name in ("a", "b", "c"):
        Image.new("RGBA", (20, 20), (1, 2, 3, 255)).save(folder / f"{name}.png")
    assert survey(open_source(f"folder:{folder}", 16)).alpha == pytest.approx(0.5)


def test_gray_stored_in_color(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(8):
        Image.linear_gradient("L").rotate(10 * i).resize((40, 40)).convert("RGB").save(folder / f"{i}.jpg")
    assert survey(open_source(f"folder:{folder}", 16)).gray
    Image.new("RGB", (40, 40), (90, 40, 40)).save(folder / "color.jpg")
    assert not survey(open_source(f"folder:{folder}", 16)).gray


def test_letters_are_not_symmetric_and_noise_is(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(40):
        image = Image.new("L", (32, 32))
        ImageDraw.Draw(image).line([(8 + i % 5, 4), (8 + i % 5, 28), (24 - i % 3, 28)], fill=255, width=4)
        image.save(folder / f"{i}.png")
    assert survey(open_source(f"folder:{folder}", 16)).asymmetry > 10
    noise = np.random.default_rng(1).normal(size=(200, 3, 16, 16))
    assert asymmetry(noise) < 1.5
    assert asymmetry(noise + np.linspace(0, 1, 16)) > 2
    assert asymmetry(np.zeros((5, 1, 16, 16))) == 1.0 and asymmetry(noise[:1]) == 1.0


def test_digits_are_not_mirrored() -> None:
    found = survey(open_source("digits", 16))
    assert (found.count, found.side, found.channels, found.num_classes) == (1797, 8, 1, 10)
    assert found.asymmetry > 2


def test_prepared_sets_have_the_size_of_their_preparation(tmp_path: Path) -> None:
    from fastgan.cli import prepare

    source = write(tmp_path / "p", 6, (50, 40))
    assert prepare.main([str(source), str(tmp_path / "set"), "--resolution", "32"]) == 0
    found = survey(open_source(str(tmp_path / "set"), 16))
    assert (found.count, found.side) == (6, 32)
