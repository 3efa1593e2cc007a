"""Videos: the closed walk, its frames, the time lapse; ffmpeg is replaced where it is not installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published import noise, save
from runs import make_run

from fastgan import load, video
from fastgan.cli.main import main
from fastgan.errors import ArgumentError


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A stand-in for imageio-ffmpeg; returns the frames that are encoded."""
    frames: list[np.ndarray] = []
    module = types.ModuleType("imageio_ffmpeg")

    def write_frames(path: str, size: tuple[int, int], **options: Any) -> Iterator[None]:
        while True:
            frame = yield
            assert frame.shape == (size[1], size[0], 3) and frame.dtype == np.uint8
            assert size[0] % 2 == size[1] % 2 == 0
            frames.append(frame)
            Path(path).write_bytes(b"video")

    monkeypatch.setattr(module, "write_frames", write_frames, raising=False)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", module)
    return frames


def test_the_loop_is_closed_smooth_and_standard_normal() -> None:
    t = torch.linspace(0, 1, 101)
    path = video.loop(0, torch.arange(400), 32, t, turns=2)
    assert path.shape == (101, 400, 32) and path.dtype == torch.float32
    torch.testing.assert_close(path[0], path[-1], rtol=0, atol=1e-5)
    for point in path[::10]:
        assert abs(point.mean().item()) < 0.03 and abs(point.std().item() - 1) < 0.03
    steps = (path[1:] - path[:-1]).norm(dim=2).mean(dim=1)
    assert steps.max() < 1.1 * steps.min()  # an even pace over all paths
    torch.testing.assert_close(video.loop(0, torch.tensor([7]), 32, t, 2)[:, 0], path[:, 7])
    assert not torch.equal(video.loop(1, torch.tensor([7]), 32, t, 2)[:, 0], path[:, 7])


@pytest.mark.parametrize("case", ["dcgan", "pggan", "sagan-classes"])
def test_walk(tmp_path: Path, encoder: list[np.ndarray], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from runs import SIZES

    monkeypatch.setitem(SIZES, "channels", 4)
    trained = load(make_run(tmp_path / "run", case))
    assert video.save_walk(trained, tmp_path / "a.mp4", n=3, seconds=0.5) == 15 == len(encoder)
    assert (tmp_path / "a.mp4").read_bytes() == b"video"
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert min(encoder[0].shape[:2]) >= 384
    assert (encoder[0][-10:, -10:] == 255).all() or case  # the empty place of a grid of 2 x 2


def test_command(tmp_path: Path, encoder: list[np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    from runs import SIZES

    run, before = tmp_path / "run", SIZES["channels"]
    SIZES["channels"] = 1
    try:
        make_run(run)
    finally:
        SIZES["channels"] = before
    out = str(tmp_path / "walk.mp4")
    assert main(["sample", str(run), "--video", out, "--seconds", "0.2"]) == 0
    assert f"6 frames of 16 images, dcgan at 12 kimg: {out}" in capsys.readouterr().out
    for kimg in (1, 10, 2):
        save(run / "samples" / f"kimg-{kimg:010.3f}.png", np.full((20, 20), 10 * kimg, np.uint8))
    encoder.clear()
    assert main(["sample", str(run), "--timelapse", out, "--seconds", "1"]) == 0
    assert "3 grids of" in capsys.readouterr().out
    shown = [int(frame[5, 5, 0]) for frame in encoder]
    assert shown == [10] * 10 + [20] * 10 + [100] * (10 + 60)  # the last one stays for two seconds


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--video a.gif", "--video must be a file that ends in .mp4, got 'a.gif'"),
        ("--timelapse a.png", "--timelapse must be a file that ends in .mp4"),
        ("--video a.mp4 --out b.png", "--out 'b.png': it is not needed with --video: remove it"),
        ("--video a.mp4 --timelapse b.mp4", "it is not needed with --video"),
        ("--video a.mp4 --interpolate", "--interpolate True: it is not needed with --video: remove it"),
        ("--video a.mp4 --seconds 0", "--seconds must be 0.1 to 3600, got 0.0"),
        ("--video nowhere/a.mp4", "--video must be a file that can be written, got 'nowhere/a.mp4'; No such file"),
        ("--timelapse a.mp4", "it has no grids in samples/"),
    ],
)
def test_refusals(
    tmp_path: Path,
    encoder: list[np.ndarray],
    capsys: pytest.CaptureFixture[str],
    flags: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    assert main(["sample", str(run), *flags.split()]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ffmpeg_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fastgan\[video\]'"):
        video.write_video(iter(()), tmp_path / "a.mp4")


def test_an_encoder_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("imageio_ffmpeg")

    def write_frames(path: str, size: tuple[int, int], **options: Any) -> Iterator[None]:
        yield
        raise OSError("Broken pipe\n\nFFMPEG COMMAND:\n...\n\nav_interleaved_write_frame(): No space left on device")

    monkeypatch.setattr(module, "write_frames", write_frames, raising=False)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", module)
    (tmp_path / "a.mp4").write_bytes(b"before")
    with pytest.raises(ArgumentError, match="No space left on device"):
        video.write_video([np.zeros((8, 8, 3), np.uint8)] * 2, tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"before"


def test_a_damaged_grid_is_named(tmp_path: Path, encoder: list[np.ndarray]) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "kimg-000001.000.png").write_bytes(b"garbage")
    with pytest.raises(ArgumentError, match=r"kimg-000001\.000\.png': the grid cannot be read"):
        video.save_timelapse(tmp_path, tmp_path / "a.mp4")


def test_real_encoder(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install 'fastgan[video]'")
    pixels = [np.full((64, 48, 3), value, np.uint8) for value in range(0, 250, 25)]
    assert video.write_video(pixels, tmp_path / "a.mp4") == 10
    reader = ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    assert next(reader)["size"] == (48, 64)
    frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    assert len(frames) == 10
    assert all(abs(frame.mean() - 25 * i) < 6 for i, frame in enumerate(frames))


def test_frames_have_even_sides_and_keep_their_pixels() -> None:
    frame = video._enlarged(noise(401, 399, 3))
    assert frame.shape == (402, 400, 3)
    np.testing.assert_array_equal(frame[:401, :399], noise(401, 399, 3))
    assert video._enlarged(noise(10, 5, 3)).shape == (390, 196, 3)
    assert Image.fromarray(frame).mode == "RGB"
