"""`--data avatars`, with stand-ins for DiceBear and resvg where they are not installed."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import noise

from fastgan.data import open_source
from fastgan.data.sources import avatars
from fastgan.errors import ArgumentError


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Packages whose avatars are noise, half of it transparent; returns the seeds that are drawn."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seeds: list[str] = []
    styles = tmp_path / "site" / "dicebear_styles"
    styles.mkdir(parents=True)
    named = {key: {"name": name} for key, name in (("source", "Open Peeps"), ("creator", "A"), ("license", "CC0 1.0"))}
    (styles / f"{avatars.STYLE}.json").write_text(json.dumps({"meta": named}))
    (styles / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("dicebear_styles", styles / "__init__.py")
    assert spec is not None
    monkeypatch.setitem(sys.modules, "dicebear_styles", importlib.util.module_from_spec(spec))
    dicebear, resvg = types.ModuleType("dicebear"), types.ModuleType("resvg_py")

    class Avatar:
        def __init__(self, style: object, options: dict[str, str]) -> None:
            self.seed = options["seed"]

        def to_string(self) -> str:
            seeds.append(self.seed)
            return self.seed

    def svg_to_bytes(svg_string: str, width: int, height: int, skip_system_fonts: bool) -> bytes:
        assert skip_system_fonts  # else the images would depend on the machine's fonts
        pixels = noise(height, width, 4, seed=int(svg_string))
        pixels[: height // 2, :, 3] = 0
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    monkeypatch.setattr(dicebear, "Avatar", Avatar, raising=False)
    monkeypatch.setattr(dicebear, "Style", lambda content: content, raising=False)
    monkeypatch.setattr(resvg, "svg_to_bytes", svg_to_bytes, raising=False)
    monkeypatch.setitem(sys.modules, "dicebear", dicebear)
    monkeypatch.setitem(sys.modules, "resvg_py", resvg)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    return seeds


def test_rendered_once_and_cached(drawn: list[str], tmp_path: Path) -> None:
    source = open_source("avatars?n=5", 16)
    assert (len(source), source.channels, source.labels, source.name) == (5, 3, None, "avatars")
    assert drawn == ["0", "1", "2", "3", "4"]
    assert source.notes == ("avatars of the style Open Peeps by A, license: CC0 1.0",)
    again = open_source(f"avatars:{avatars.STYLE}?n=5", 16)
    assert len(drawn) == 5
    assert again.fingerprint == source.fingerprint
    np.testing.assert_array_equal(again.read(3, 16), source.read(3, 16))
    assert [file.suffix for file in (tmp_path / "cache" / "fastgan" / "avatars").iterdir()] == [".zip"]


def test_an_image_does_not_depend_on_the_number_of_images(drawn: list[str]) -> None:
    few, many = (open_source(f"avatars?n={n}", 16) for n in (2, 4))
    np.testing.assert_array_equal(few.read(1, 16), many.read(1, 16))
    assert few.fingerprint != many.fingerprint


def test_rendered_at_any_size(drawn: list[str]) -> None:
    for side in (8, 64):
        assert open_source("avatars?n=1", side).read(0, side).shape == (3, side, side)
    assert drawn == ["0", "0"]


def test_background_and_alpha(drawn: list[str]) -> None:
    white, green = open_source("avatars?n=1", 16), open_source("avatars?n=1", 16, background="#00ff00")
    assert (white.read(0, 16)[:, 0] == 255).all()
    assert (green.read(0, 16)[:, 0] == np.array([[0], [255], [0]])).all()
    assert white.fingerprint != green.fingerprint
    rgba = open_source("avatars?n=1", 16, 4)
    image = rgba.read(0, 16)
    assert rgba.channels == 4 and (image[:, :8] == 0).all()
    assert (image[:3] <= image[3]).all()
    assert len(drawn) == 1


def test_an_interrupted_rendering_leaves_nothing(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = avatars._Renderer.__call__

    def interrupt(self: avatars._Renderer, index: int, side: int) -> bytes:
        if index == 2:
            raise KeyboardInterrupt
        return real(self, index, side)

    with monkeypatch.context() as patch:
        patch.setattr(avatars._Renderer, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_source("avatars?n=3", 16)
    assert list((avatars.cache_folder("avatars")).iterdir()) == []
    assert len(open_source("avatars?n=3", 16)) == 3


def test_a_damaged_cache_is_rendered_again(drawn: list[str]) -> None:
    source = open_source("avatars?n=3", 16)
    assert source.path is not None
    source.path.write_bytes(source.path.read_bytes()[:100])
    assert open_source("avatars?n=3", 16).fingerprint == source.fingerprint


def test_a_cache_that_cannot_be_read_now_is_kept(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("avatars?n=3", 16)
    assert source.path is not None
    before = source.path.read_bytes()

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for name in ("ZipFile", "_EndRecData"):
        with monkeypatch.context() as patch:
            patch.setattr(avatars.zipfile, name, failing)
            with pytest.raises(ArgumentError, match="cannot be read now"):
                open_source("avatars?n=3", 16)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(ArgumentError, match="cannot be read now"):
            source.read(0, 16)
    assert len(drawn) == 3 and source.path.read_bytes() == before


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("avatars:nobody", f"its style must be one of {avatars.STYLE}"),
        ("avatars?n=0", "its n must be a whole number from 1 to 1,000,000"),
        ("avatars?n=-1", "its n must be"),
        ("avatars?m=1", "its options must be n, got m"),
    ],
)
def test_refusals(drawn: list[str], spec: str, problem: str) -> None:
    with pytest.raises(ArgumentError) as error:
        open_source(spec, 16)
    assert problem in str(error.value)


@pytest.mark.parametrize("module", ["dicebear", "dicebear_styles", "resvg_py"])
def test_missing_package(drawn: list[str], monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentError, match="pip install dicebear-core dicebear-styles resvg-py"):
        open_source("avatars", 16)


def test_a_cache_that_cannot_be_written(drawn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ArgumentError, match=r"cannot be written .* XDG_CACHE_HOME"):
        open_source("avatars?n=1", 16)


def test_real_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(module, reason="pip install 'fastgan[avatars]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_source("avatars?n=4", 32)
    images = np.stack([source.read(i, 32) for i in range(4)])
    assert (images[:, :, 0, 0] == 255).all()  # the ground of a face
    assert len({image.tobytes() for image in images}) == 4
    assert "CC0 1.0" in source.notes[0]
