"""Videos: a closed walk through the latents of a trained generator, and the sample grids of a run one after another.

Frames are encoded as H.264 by ffmpeg, which the package imageio-ffmpeg brings.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgan.data.faults import raise_if_machine
from fastgan.data.images import load_image
from fastgan.data.sheets import labeled, sheet
from fastgan.errors import ArgumentError
from fastgan.generator import TrainedGenerator, device_of, generate
from fastgan.utils import counter_rng
from fastgan.utils.files import read_regular

FPS = 30
_LEAST_SIDE = 384  # px; smaller frames are enlarged by repetition, without blur
_SECONDS_PER_TURN = 4.0
_HOLD = 2.0  # seconds for which the last grid of a time lapse stays


def loop(seed: int, paths: Tensor, dimension: int, t: Tensor, turns: int) -> Tensor:
    """Closed smooth paths whose every point is a standard normal latent.

    Path i is z_i(t) = sum over k of (a_ik cos(2 pi k t) + b_ik sin(2 pi k t)) / sqrt(turns), with standard normal a_ik
    and b_ik, k from 1 to `turns`: at each t the variances of a cosine and its sine add up to 1.

    Args:
        seed: of the paths; path i depends on (seed, i) alone.
        paths: numbers of paths, int64 [n].
        dimension: of the latents.
        t: float [m]; 0 and 1 are the same point.
        turns: highest frequency; the distance covered grows with it.

    Returns:
        float32 [m, n, dimension].
    """
    k = torch.arange(1, turns + 1, dtype=torch.float64)  # on the host: mps has no float64
    angle = 2 * math.pi * t.to("cpu", torch.float64)[:, None] * k
    weights = (torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(turns)).float().to(paths.device)
    ends = torch.stack([counter_rng.normal(seed, f"loop {i}", paths, dimension) for i in range(2 * turns)])
    return torch.einsum("mk,knd->mnd", weights, ends)


def walk_frames(
    trained: TrainedGenerator, n: int, seconds: float, seed: int = 0, truncation: float = 1.0
) -> Iterator[np.ndarray]:
    """Grids of `n` images that walk on closed paths; the frame after the last is the first.

    Yields:
        uint8 [h, w, 3], h and w even; transparent parts are white.
    """
    module, networks = trained.module, trained.meta["networks"]
    device, count = device_of(module), max(2, round(seconds * FPS))
    index = torch.arange(n, device=device)
    turns = max(1, round(seconds / _SECONDS_PER_TURN))
    labels = index % trained.num_classes if trained.num_classes else None
    for frame in range(count):
        latent = loop(seed, index, trained.latent, torch.tensor([frame / count]), turns)[0]
        images = generate(module, truncation * latent, labels, networks["resolution"])
        yield _frame(((images + 1) * 127.5).round().to(torch.uint8).numpy())


def save_walk(
    trained: TrainedGenerator, path: Path, n: int = 16, seconds: float = 8.0, seed: int = 0, truncation: float = 1.0
) -> int:
    """Write a walk through the latents as .mp4, whole or not at all; returns the number of frames.

    Args:
        n: images side by side.
        seconds: length of the video.
        seed: of the paths.
        truncation: factor of the latents, in (0, 1].

    Raises:
        ArgumentError: imageio-ffmpeg is missing, or the file cannot be written.
    """
    return write_video(walk_frames(trained, n, seconds, seed, truncation), path)


def save_timelapse(run: Path, path: Path, seconds: float = 8.0) -> int:
    """Write the sample grids of a run as .mp4, in the order of training; returns the number of grids.

    Raises:
        ArgumentError: the run has no grids, imageio-ffmpeg is missing, or the file cannot be written.
    """
    grids = sorted((run / "samples").glob("kimg-*[0-9].[0-9][0-9][0-9].png"))
    if not grids:
        raise ArgumentError("RUN", str(run), "it has no grids in samples/")
    each = max(1, round(seconds * FPS / len(grids)))
    write_video(_timelapse_frames(grids, each), path)
    return len(grids)


def _timelapse_frames(grids: list[Path], each: int) -> Iterator[np.ndarray]:
    from PIL import Image

    size: tuple[int, int] | None = None
    for grid in grids:
        try:
            with load_image(read_regular(grid), formats=("PNG",)) as (image, _):
                picture = image.convert("RGBA")
        except Exception as error:  # Pillow's decoders raise nearly any exception on a damaged file
            raise_if_machine(error, "RUN", str(grid))
            raise ArgumentError("RUN", str(grid), f"the grid cannot be read ({error}); remove it") from error
        size = size or picture.size
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        if picture.size != size:  # of a resumed run with another --samples
            picture = picture.resize(size, Image.Resampling.NEAREST)
        kimg = float(grid.stem.removeprefix("kimg-"))
        frame = _enlarged(np.asarray(labeled(picture, [f"{kimg:g} kimg"], 1, picture.height)))
        yield from [frame] * (each if grid != grids[-1] else each + round(_HOLD * FPS))


def _frame(pixels: np.ndarray) -> np.ndarray:
    """Images uint8 [n, C, R, R] as one grid, [h, w, 3]."""
    if pixels.shape[1] == 4:
        color, alpha = pixels[:, :3], pixels[:, 3:]
        pixels = np.minimum(color, alpha) + (255 - alpha)
    grid = sheet(pixels)
    return _enlarged(np.repeat(grid, 3, axis=2) if grid.shape[2] == 1 else grid)


def _enlarged(frame: np.ndarray) -> np.ndarray:
    """A frame that is not too small to see, with even sides, as H.264 needs."""
    scale = -(-_LEAST_SIDE // max(frame.shape[:2])) if max(frame.shape[:2]) < _LEAST_SIDE else 1
    frame = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def write_video(frames: Iterable[np.ndarray], path: Path) -> int:
    """Encode frames, uint8 [h, w, 3] of one size, as .mp4, whole or not at all; returns their number.

    Raises:
        ArgumentError: imageio-ffmpeg is missing, or the file cannot be written.
    """
    try:
        ffmpeg = importlib.import_module("imageio_ffmpeg")
    except ImportError:
        problem = "it needs imageio-ffmpeg, which is not installed; pip install 'fastgan[video]'"
        raise ArgumentError("--video", str(path), problem) from None
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part.mp4")
    writer, count = None, 0
    try:
        with partial.open("wb"):  # reports a folder that cannot be written before the first frame is drawn
            pass
        for frame in frames:
            if writer is None:
                size = frame.shape[1], frame.shape[0]
                options = ["-crf", "18", "-movflags", "+faststart"]
                writer = ffmpeg.write_frames(
                    str(partial), size, fps=FPS, macro_block_size=2, quality=None, output_params=options
                )
                writer.send(None)
            writer.send(np.ascontiguousarray(frame))
            count += 1
        if writer is not None:
            writer.close()
        partial.replace(path)
    except OSError as error:  # of ffmpeg too, with its whole output
        reason = error.strerror or str(error).strip().splitlines()[-1]
        raise ArgumentError("--video", str(path), f"must be a file that can be written; {reason}") from None
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
    return count
