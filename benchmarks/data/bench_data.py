"""Throughput of every pipeline at 4 to 1024 px, and the share of a training step that waits for data.

    python -m benchmarks.data.bench_data [PART ...] [--widths small|paper] [--resolutions 4 64 ...] [--seconds 0.3]
                                    [--rounds 5]

Prints the tables of docs/data.md, all or those of the parts named:

- throughput: images/s of the three pipelines and of a DataLoader with Pillow, all with the same float32 batches; also
  from files of 256 px to 128 px;
- memcpy: the cache's gather, and its whole batches, compared with copying as many bytes;
- training: steps of pggan with the pipeline that `--pipeline auto` selects.

The sides take turns; numbers are medians. The load of the machine is printed first, as it slows the sides unequally.


Images are synthetic: octaves of smooth noise with edges, JPEG quality 90, with files as large as those of photographs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgan import data
from fastgan.config import Config, batch_at, replace
from fastgan.config.variants import VARIANTS
from fastgan.data.images import area_average
from fastgan.data.loading import dali
from fastgan.data.loading.gather import RowGatherer
from fastgan.data.source_types import Encoded, Source
from fastgan.training.distributed import rendezvous
from fastgan.training.trainer import Trainer
from fastgan.utils.system import cpu_count, device_name

RESOLUTIONS = [2**i for i in range(2, 11)]
WORKERS = min(8, cpu_count())
# Networks narrower than in practice train faster, which makes it harder to feed them.
WIDTHS: dict[str, dict[str, Any]] = {
    "small": {"fmap_base": 1024, "fmap_max": 64, "latent": 64},
    "paper": {},
}


def photo(seed: int, side: int) -> np.ndarray:
    """A synthetic photograph, uint8 [side, side, 3]: each octave has 0.55 of the contrast of the coarser one."""
    rng = np.random.default_rng(seed)
    out = np.zeros((side, side, 3), dtype=np.float32)
    for octave in range(1, side.bit_length()):
        noise = rng.standard_normal((3, 2**octave, 2**octave)).astype(np.float32)
        planes = (Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC) for plane in noise)
        out += 0.55**octave * np.stack([np.asarray(plane) for plane in planes], axis=-1)
    out = 0.4 * out + 0.6 * out.mean(axis=2, keepdims=True)
    rows, columns = np.ogrid[:side, :side]
    for _ in range(6):
        y, x = rng.integers(0, side, 2)
        radius = side // int(rng.integers(4, 16))
        out[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] += 0.4 * rng.standard_normal(3)
    return (255 * (out - out.min()) / np.ptp(out)).astype(np.uint8)


class Photos(Source):
    """Images that are stored as arrays, as files, or both, by resolution."""

    def __init__(
        self, count: int, resolution: int, arrays: dict[int, np.ndarray], files: dict[int, list[Path]]
    ) -> None:
        super().__init__("photos", resolution=resolution, channels=3, labels=None, num_classes=0, fingerprint="photos")
        self._count, self._arrays, self._files = count, arrays, files

    def __len__(self) -> int:
        return self._count

    def _target(self, index: int) -> np.ndarray:
        return self.read(index, self.resolution)

    def read(self, index: int, resolution: int) -> np.ndarray:
        return pixels(self._files[resolution][index], resolution)

    def arrays(self, resolution: int) -> list[np.ndarray] | None:
        return shards(self._arrays[resolution]) if resolution in self._arrays else None

    def encoded(self, resolution: int) -> Encoded | None:
        files = self._files[resolution]
        kinds = {("JPEG", "RGB", False): str(files[0])}
        return Encoded(lambda i: files[i].read_bytes(), lambda i: str(files[i]), resolution, kinds, exact=True)


def shards(array: np.ndarray) -> list[np.ndarray]:
    """The shards that `fastgan prepare` would write."""
    return [array[i : i + 1024] for i in range(0, len(array), 1024)]


def pixels(file: Path, resolution: int) -> np.ndarray:
    """Decode with Pillow as a usual Dataset does: uint8 [3, resolution, resolution]."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
        if image.width != resolution:
            image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class Files(torch.utils.data.Dataset):
    """The dataset of the DataLoader."""

    def __init__(self, files: list[Path], resolution: int) -> None:
        self._files, self._resolution = files, resolution

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(pixels(self._files[index], self._resolution))


def dataloader(files: list[Path], resolution: int, batch: int) -> Iterator[torch.Tensor]:
    """Endless float batches in [-1, 1] from worker processes, shuffled anew in each epoch."""
    sampler = data.Sampler(len(files), seed=0)

    def calls() -> Iterator[list[int]]:
        start = 0
        while True:
            yield sampler.indices(range(start, start + batch)).tolist()
            start += batch

    gc.collect()  # a forked worker crashes when it destroys the remains of a DALI pipeline
    loader = torch.utils.data.DataLoader(
        Files(files, resolution),
        batch_sampler=calls(),
        num_workers=WORKERS,
        prefetch_factor=2,
    )
    return (images.float().div_(127.5).sub_(1) for images in loader)


def rate(step: Callable[[], Any], images: int, seconds: float, skip: int, clock: Callable[[], float]) -> float:
    """Images/s over `seconds`, after `skip` batches that may have been made while another side was measured."""
    for _ in range(skip):
        step()
    began, count = clock(), 0
    while (took := clock() - began) < seconds or count < 3:
        step()
        count += 1
    return count * images / took


def compare(
    sides: dict[str, tuple[Callable[[], Any], int]],
    batch: int,
    seconds: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return medians of images/s. sides: name -> (function that makes a batch, number of batches it prefetches)."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (step, ready) in sides.items():
            rates[name].append(rate(step, batch, seconds, ready + 1, clock))
    return {name: statistics.median(values) for name, values in rates.items()}


def stepper(pipeline: data.Pipeline) -> Callable[[], Any]:
    return lambda: next(pipeline)


class Bench:
    """Files and arrays of every resolution in one temporary folder, made on first use."""

    def __init__(self, folder: Path, seconds: float, rounds: int) -> None:
        self.folder, self.seconds, self.rounds = folder, seconds, rounds
        self._base = [photo(seed, 1024) for seed in range(8)]
        self._files: dict[int, list[Path]] = {}

    def files(self, resolution: int) -> list[Path]:
        """JPEGs, 512 up to 256 px and 64 above: crops of the photographs, so that they have as much detail."""
        if resolution not in self._files:
            count = 512 if resolution <= 256 else 64
            where = self.folder / f"jpeg{resolution}"
            where.mkdir()
            rng = np.random.default_rng(resolution)
            half = max(resolution, 256)
            for i in range(count):
                top, left = rng.integers(0, 1024 - half + 1, 2)
                window = self._base[i % 8][top : top + half, left : left + half].transpose(2, 0, 1)
                image = Image.fromarray(area_average(window, resolution).transpose(1, 2, 0))
                image.save(where / f"{i:04}.jpg", quality=90)
            self._files[resolution] = sorted(where.iterdir())
        return self._files[resolution]

    def array(self, resolution: int, megabytes: float) -> np.ndarray:
        """Memory-mapped uint8 [N, 3, r, r] of about that size, at least 64 images."""
        count = max(64, min(50_000, int(megabytes * 1e6) // (3 * resolution**2)))
        file = self.folder / f"array{resolution}-{count}.npy"
        if not file.exists():
            window = self._base[0][:resolution, :resolution].transpose(2, 0, 1)
            np.save(file, np.broadcast_to(window, (count, 3, resolution, resolution)))
        return np.load(file, mmap_mode="r")

    def throughput(self, resolution: int) -> dict[str, float]:
        """Images/s of float32 batches."""
        batch = batch_of(resolution)
        files, array = self.files(resolution), self.array(resolution, 200)
        stored = Photos(len(array), resolution, {resolution: array}, {})
        photos = Photos(len(files), resolution, {}, {resolution: files})
        loader = dataloader(files, resolution, batch)
        with contextlib.ExitStack() as stack:

            def opened(source: Source, kind: Any) -> Callable[[], Any]:
                pipeline = data.open(source, resolution, batch, pipeline=kind, workers=WORKERS, resident_bytes=0)
                return stepper(stack.enter_context(pipeline))

            sides = {"cache": (opened(stored, "cache"), 1)}
            if not dali.missing():
                sides["dali"] = (opened(photos, "dali"), 1)
            sides["torch"] = (opened(photos, "torch"), 1)
            sides["DataLoader"] = (lambda: next(loader), 2 * WORKERS)
            return compare(sides, batch, self.seconds, self.rounds)

    def resize(self) -> dict[str, float]:
        """Images/s from files of 256 px to 128 px: decoded, resized, float32."""
        source = data.open_source(f"folder:{self.files(256)[0].parent}", 128)
        loader = dataloader(self.files(256), 128, 32)
        with contextlib.ExitStack() as stack:

            def opened(kind: Any) -> Callable[[], Any]:
                pipeline = data.open(source, 128, 32, pipeline=kind, workers=WORKERS)
                return stepper(stack.enter_context(pipeline))

            sides = {} if dali.missing() else {"dali": (opened("dali"), 1)}
            sides |= {"torch": (opened("torch"), 1), "DataLoader": (lambda: next(loader), 2 * WORKERS)}
            return compare(sides, 32, self.seconds, self.rounds)

    def gather(self, resolution: int, batch: int) -> dict[str, float]:
        """Images/s of the cache's gather alone, and of copying as many contiguous bytes.

        CPU time of one thread: both sides wait for memory alone. 200 MB, larger than the caches; the images in the
        order of a run, the copy in sequence.
        """
        array = self.array(resolution, 200)
        whole = np.array(array)
        order = data.Sampler(len(array), seed=0)
        mapped = RowGatherer(shards(array))
        memory = RowGatherer([whole])
        calls = [order.indices(range(at, at + batch)) for at in range(0, len(array) - batch, batch)]
        at = [0]

        def following() -> int:
            at[0] = (at[0] + 1) % len(calls)
            return at[0]

        def copy() -> np.ndarray:
            first = batch * following()
            return whole[first : first + batch].copy()

        sides: dict[str, tuple[Callable[[], Any], int]] = {
            "memcpy": (copy, 0),
            "memory-mapped": (lambda: mapped.take(calls[following()]), 0),
            "in memory": (lambda: memory.take(calls[following()]), 0),
        }
        for call in calls:  # every page once
            mapped.take(call)
        # Many short turns, because the load of the machine changes within seconds.
        return compare(sides, batch, self.seconds / 10, 5 * self.rounds, time.thread_time)

    def batches(self, resolution: int, batch: int) -> dict[str, float]:
        """Images/s of the cache's whole batches, float32 and flipped, and of copying contiguous float32 images.

        CPU time of all threads, 200 MB on both sides, every page in memory.
        """
        array = self.array(resolution, 200)
        floats = np.ones((max(4 * batch, len(array) // 4), 3, resolution, resolution), dtype=np.float32)
        at = [0]

        def copy() -> np.ndarray:
            at[0] = (at[0] + batch) % (len(floats) - batch)
            return floats[at[0] : at[0] + batch].copy()

        source = Photos(len(array), resolution, {resolution: array}, {})
        with data.open(source, resolution, batch, pipeline="cache", resident_bytes=0, mirror=True) as pipeline:
            for _ in range(max(100, len(array) // batch)):  # every page once, until batches are gathered in this thread
                next(pipeline)
            sides = {"memcpy": (copy, 0), "cache": (stepper(pipeline), 0)}
            return compare(sides, batch, self.seconds / 10, 5 * self.rounds, time.process_time)

    def training(self, resolutions: list[int], widths: str) -> Iterator[tuple[int, str, float, float]]:
        """Yield resolution, pipeline, images/s, and the share of the time that waits for batches.

        One progressive run; some steps are measured at each of the resolutions.
        """
        target = max(resolutions)
        config = training_config(target, widths, str(self.folder / "run"))
        count = 64
        levels = [r for r in RESOLUTIONS if r <= target]
        arrays = {r: self.array(r, 0)[:count] for r in levels if r <= 128}
        files = {r: self.files(r)[:count] for r in levels if r > 128}
        source = Photos(count, target, arrays, files)
        trainer = Trainer(config, "pggan", rendezvous.start("torch", "auto", zero=0), source, self.folder)
        try:
            for resolution in levels:
                if trainer.stage.resolution < resolution:
                    trainer.grow()
                if resolution not in resolutions:
                    continue
                # The cache gathers in another thread until it does not need the disk.
                for _ in range(12 if resolution in arrays else 2):
                    trainer.train_step()
                trainer.feed.waited, images, began, took = 0.0, trainer.images, time.perf_counter(), 0.0
                while took < 4 * self.seconds or trainer.images - images < 3 * batch_of(resolution):
                    trainer.train_step()
                    if trainer.world.device.type == "cuda":
                        torch.cuda.synchronize()
                    took = time.perf_counter() - began
                yield (
                    resolution,
                    trainer.feed.pipeline.kind[0],
                    (trainer.images - images) / took,
                    trainer.feed.waited / took,
                )
        finally:
            trainer.feed.pipeline.close()


def batch_of(resolution: int) -> int:
    """Batch sizes of the paper."""
    return batch_at(VARIANTS["pggan"].config("paper").schedule, resolution)


def training_config(resolution: int, widths: str, out: str) -> Config:
    config = VARIANTS["pggan"].config("paper")
    return replace(
        config,
        networks=WIDTHS[widths],
        schedule={"resolution": resolution},
        data={"resident_gb": 0.0, "workers": WORKERS, "mirror": True},
        run={"out": out},
    )


def machine() -> str:
    """Return one line about the machine and the versions that the numbers come from."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else "unknown"
    versions = f"torch {torch.__version__}, {dali.missing() or f'DALI {dali.version()}'}"
    processor = device_name(torch.device("cpu"))
    return f"{processor}, {WORKERS} workers, {versions}, commit {commit}, load before {os.getloadavg()[0]:.1f}"


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def throughput_table(bench: Bench, resolutions: list[int], widths: str) -> None:
    print("\nimages/s, float32 batches; cache from decoded files, the others from JPEGs of that size\n")
    row("px", "batch", "`cache`", "`dali`", "`torch`", "DataLoader + Pillow", "cache / DL", "dali / DL")
    row(*["---"] * 8)
    for resolution in resolutions:
        throughput(f"{resolution}", batch_of(resolution), bench.throughput(resolution))
    throughput("256 px files to 128 px", 32, bench.resize())


def memcpy_table(bench: Bench, resolutions: list[int], widths: str) -> None:
    print("\nCPU time in multiples of memcpy: gather against as many bytes, whole batches against as many floats\n")
    row("px", "batch", "gather, mapped", "gather, in memory", "whole batches", "memcpy of bytes, GB/s")
    row(*["---"] * 6)
    for resolution in (16, 64, 128):
        r, whole = bench.gather(resolution, 64), bench.batches(resolution, 64)
        times = (f"{r['memcpy'] / r[name]:.2f}" for name in ("memory-mapped", "in memory"))
        speed = r["memcpy"] * 3 * resolution**2 / 1e9
        row(resolution, 64, *times, f"{whole['memcpy'] / whole['cache']:.2f}", f"{speed:.1f}")


def training_table(bench: Bench, resolutions: list[int], widths: str) -> None:
    print(f"\npggan, {widths} widths, --pipeline auto\n")
    row("px", "pipeline", "images/s trained", "waiting")
    row(*["---"] * 4)
    for resolution, kind, speed, waiting in bench.training(sorted(resolutions), widths):
        row(resolution, kind, f"{speed:.{0 if speed >= 10 else 1}f}", f"{100 * waiting:.2f}%")


PARTS = {"throughput": throughput_table, "memcpy": memcpy_table, "training": training_table}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--widths", choices=WIDTHS, default="small", help="of the pggan that is trained")
    parser.add_argument("--resolutions", type=int, nargs="+", choices=RESOLUTIONS, default=RESOLUTIONS)
    parser.add_argument("--seconds", type=float, default=0.3, help="each side and round")
    parser.add_argument("--rounds", type=int, default=5)
    request = parser.parse_args(argv)
    unknown = [part for part in request.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART must be {', '.join(PARTS)}, got {unknown[0]!r}")
    torch.set_flush_denormal(True)
    began = time.monotonic()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), request.seconds, request.rounds)
        for part in request.parts or PARTS:
            PARTS[part](bench, request.resolutions, request.widths)
    print(f"\n{time.monotonic() - began:.0f} s, load after {os.getloadavg()[0]:.1f}")
    return 0


def throughput(what: str, batch: int, r: dict[str, float]) -> None:
    """Print one row of the first table. r: side -> images/s."""
    speeds = (f"{r[name]:,.0f}" if name in r else "" for name in ("cache", "dali", "torch", "DataLoader"))
    gains = (f"{r[name] / r['DataLoader']:.2f}" if name in r else "" for name in ("cache", "dali"))
    row(what, batch, *speeds, *gains)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
