"""A folder of stickers, from the command line to pictures: transparency is kept at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import save

import fastgan
from fastgan.cli.main import main
from fastgan.explorer import page as explorer

FLAGS = (
    "--variant dcgan --preset digits --resolution 16 --width 8 --max-width 16 --latent 8 --batch 8 --kimg 0.032 "
    "--samples 4 --threads 1"
).split()


@pytest.fixture(scope="module")
def stickers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve red bars of different heights on a clear ground, wider than high, and a drawing."""
    folder = tmp_path_factory.mktemp("stickers")
    for i in range(12):
        pixels = np.zeros((16, 24, 4), np.uint8)
        pixels[i:, 6:18] = (255, 0, 0, 255)
        save(folder / f"{i:02}.png", pixels)
    (folder / "drawing.svg").write_text("<svg/>")
    return folder


@pytest.fixture(scope="module")
def run(stickers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "rgba"
    assert main(["train", *FLAGS, "--data", str(stickers), "--channels", "4", "--fit", "pad", "--out", str(run)]) == 0
    return run


def mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def test_samples_and_grids_are_transparent(run: Path, tmp_path: Path) -> None:
    assert {mode(path) for path in (run / "samples").glob("*.png")} == {"RGBA"}
    assert main(["sample", str(run), "--n", "4", "--out", str(tmp_path / "a.png")]) == 0
    assert mode(tmp_path / "a.png") == "RGBA"
    assert fastgan.load(run).sample(2).shape == (2, 4, 16, 16)


def test_exports_keep_the_fourth_channel(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 0
    assert "color with transparency (RGBA, colors multiplied by alpha)" in (tmp_path / "out" / "README.md").read_text()
    exported = fastgan.load(tmp_path / "out")
    np.testing.assert_array_equal(exported.sample(2).numpy(), fastgan.load(run).sample(2).numpy())


def test_explore_shows_transparency(run: Path) -> None:
    grid = explorer.picture(fastgan.load(run), 2, 0, 1, 0.0, 1.0, -1)
    assert grid.shape == (512, 512, 4)
    assert len(np.unique(grid[..., 3])) > 1


def test_the_run_says_what_it_does_with_the_files(stickers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *FLAGS, "--data", str(stickers), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 images have alpha: they are put on white (--background); --channels 4 trains transparency" in out
    assert "1 SVG file is not read; render it to PNG first" in out


def test_a_run_resumes_with_its_own_framing_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["train", "--resume", str(run)]
    assert main(again) == 0
    assert main([*again, "--fit", "crop"]) == 2
    assert "must be the data of the stored run" in capsys.readouterr().err


def test_a_color_that_is_none(stickers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *FLAGS, "--data", str(stickers), "--background", "whitish", "--out", str(tmp_path / "r")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "--background must be a color such as white" in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_evaluation_of_transparent_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--metrics", "msssim,swd", "--n", "4"]) == 0
    assert "MS-SSIM of pairs" in capsys.readouterr().out


def test_samples_of_a_conditional_run_have_the_names_of_classes(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / "photos" / ("c\aat" if i % 2 else "dog") / f"{i}.png")
    run, flags = tmp_path / "run", "--variant sagan --width 8 --max-width 8 --conditional".split()
    assert main(["train", *FLAGS, *flags, "--data", str(tmp_path / "photos"), "--out", str(run)]) == 0
    trained = fastgan.load(run)
    assert trained.class_names == ["c\\x07at", "dog"]  # what a terminal would obey is not stored
    assert main(["sample", str(run), "--n", "4", "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 64, 2 * (64 + 14))
        strips = np.asarray(image.convert("L"))[64:78, :64], np.asarray(image.convert("L"))[64:78, 64:]
    assert (strips[0] < 128).any() and (strips[0] != strips[1]).any()


@pytest.mark.parametrize("data", ["x" * 5000, "folder:" + "x" * 5000, "~nobody-of-this-name/photos"])
def test_a_name_that_no_folder_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str) -> None:
    assert main(["train", *FLAGS, "--data", data, "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "--data" in error and error.count("\n") == 1
