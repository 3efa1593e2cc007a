"""Batches on the device, by position. Where the images come from is an `ImageStore`."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F

from fastgan.data.images import area_average
from fastgan.data.loading import dali
from fastgan.data.loading.cache import MappedStore, ResidentStore, upload_all
from fastgan.data.loading.gather import to_float
from fastgan.data.loading.image_store import BatchRequest, ImageStore, counted, upload
from fastgan.data.loading.sampler import Sampler, rank_positions
from fastgan.data.loading.threads import ThreadedStore
from fastgan.data.registry import open_source
from fastgan.data.source_types import Source
from fastgan.errors import ArgumentError, printable
from fastgan.utils.splitmix import GOLDEN_GAMMA, signed64, splitmix64
from fastgan.utils.system import MAX_THREADS, cpu_count
from fastgan.utils.text import readable_size

# `open` shadows the builtin on purpose, for callers that write `fastgan.data.open(...)`.
__all__ = ["KINDS", "Batch", "Kind", "Pipeline", "fade", "open"]

Kind = Literal["auto", "cache", "dali", "torch"]
KINDS: tuple[Kind, ...] = ("auto", "cache", "dali", "torch")


class Batch(NamedTuple):
    """One rank's share of a global batch, on the device.

    Attributes:
        images: float32 [n, C, r, r] in [-1, 1].
        labels: int64 [n], or None.
        positions: of the samples in the run, int64 [n].
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor


class Pipeline:
    """Batches by position: the same call gives the same batch, whatever was requested before.

    `fastgan.data.open` is another name of this class. Iteration continues from `position` without end, across the ends
    of epochs.

    Args:
        source: from `open_source`, or a value of `--data`.
        resolution: of the images at the start, px.
        batch: images of a global batch, for iteration.
        rank: this process.
        world: number of processes.
        seed: of order and flips.
        device: of the batches.
        mirror: flip half of the samples left to right.
        pipeline: "cache" gathers decoded images; "dali" and "torch" decode one batch ahead; "auto" takes the first of
            them that can make the images, and `describe` reports why.
        workers: decoding threads; 0 for this rank's share of the cores, at most 8.
        resident_bytes: a set of at most this size as uint8 is decoded once and kept on the device; None for 1 GiB, or
            a quarter of a GPU's free memory.
        target: highest resolution that `set_resolution` may request, if `source` is text; None: `resolution`.

    Raises:
        ArgumentError: the source cannot be opened or does not have the resolution, `pipeline` cannot make its images
            up to the target, or an argument is out of range.
    """

    def __init__(
        self,
        source: Source | str | Path,
        resolution: int,
        batch: int | None = None,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        mirror: bool = False,
        pipeline: Kind = "auto",
        workers: int = 0,
        resident_bytes: int | None = None,
        target: int | None = None,
    ) -> None:
        if workers < 0:
            raise ArgumentError("--workers", workers, "must be at least 0; 0 is a share of the cores, at most 8")
        if workers > MAX_THREADS:
            raise ArgumentError("--workers", workers, f"must be at most {MAX_THREADS}")
        if resident_bytes is not None and resident_bytes < 0:
            raise ArgumentError("resident_bytes", resident_bytes, "must be at least 0")
        if pipeline not in KINDS:
            raise ArgumentError("--pipeline", pipeline, f"must be {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        rank_positions(0, max(world, 1) if batch is None else batch, rank, world)  # raises if one is out of range
        self.source = source if isinstance(source, Source) else open_source(str(source), target or resolution)
        self.source.require_resolution(resolution)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # With its index, as the current device of another thread may be another one.
            self.device = torch.device("cuda", torch.cuda.current_device())
        if resident_bytes is None:
            resident_bytes = 2**30 if self.device.type != "cuda" else torch.cuda.mem_get_info(self.device)[0] // 4
        self.mirror, self.batch_size, self.position = mirror, batch, 0
        self._rank, self._world = rank, world
        self._requested, self._resident_bytes = pipeline, resident_bytes
        self._sampler = Sampler(len(self.source), seed)
        self._select(self.source.resolution)  # refuses now what would fail when the run reaches its target
        self._workers = workers or _decoding_threads()
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fastgan-data")
        labels = self.source.labels
        self._labels = None if labels is None else torch.from_numpy(labels).to(self.device)
        # The decoded set at the target resolution, on the host; lower resolutions are computed from it.
        self._decoded: np.ndarray | None = None
        self.resolution = resolution
        self._store = self._open_store(resolution)

    @property
    def seed(self) -> int:
        """The seed of order and flips. `load_state_dict` may change it."""
        return self._sampler.seed

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Continue at another resolution, in the same order and with the same flips.

        Args:
            resolution: px.
            batch: new size of the global batch, or None.

        Raises:
            ArgumentError: the source does not have the resolution, or the batch is not a multiple of the ranks.
        """
        self.source.require_resolution(resolution)
        if batch is not None:
            rank_positions(0, batch, self._rank, self._world)
            self.batch_size = batch
        if resolution == self.resolution:
            return
        self._store.close()
        self._store = self._open_store(resolution)
        self.resolution = resolution

    def batch(self, start: int, size: int, *, rank: int | None = None, world: int | None = None) -> Batch:
        """Return this rank's share of a global batch, n = size / world samples. `position` becomes its end.

        Args:
            start: position of the global batch.
            size: images of the global batch.
            rank: instead of the pipeline's own, for gradient accumulation over virtual ranks.
            world: the same.

        Raises:
            ArgumentError: `size` is not a multiple of `world`, `start` is negative, or an image cannot be decoded.
        """
        rank = self._rank if rank is None else rank
        request = BatchRequest(start, size, rank, self._world if world is None else world)
        positions = rank_positions(*request)
        indices = self._sampler.indices(positions)
        flips = mirrored(self.seed, positions) if self.mirror else None
        if self.device.type == "cpu":
            on_device, device_indices = torch.from_numpy(positions), torch.from_numpy(indices)
            images = to_float(self._store.take(request, indices, device_indices), flips)
        else:
            rows = [positions, indices]
            if flips is not None:
                # Rows of the batch concatenated with its mirror image.
                rows.append(np.arange(len(positions)) + len(positions) * flips)
            on_device, device_indices, *chosen = upload(torch.from_numpy(np.stack(rows)), self.device)
            images = self._store.take(request, indices, device_indices)
            if flips is not None:
                # Selecting bytes takes a sixth of the time of `torch.where`.
                images = torch.cat([images, images.flip(3)]).index_select(0, chosen[0])
            images = images.float().div_(127.5).sub_(1)
        labels = None if self._labels is None else self._labels[device_indices]
        self.position = start + size
        return Batch(images, labels, on_device)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self.batch_size is None:
            raise ArgumentError("batch", None, "iterating needs a pipeline that was opened with a batch")
        return self.batch(self.position, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return {"position": int, "seed": int, "fingerprint": str}, the same on every rank."""
        return {"position": self.position, "seed": self.seed, "fingerprint": self.source.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stored run. No image of an epoch is lost or repeated, with another world or batch either.

        Raises:
            ArgumentError: the state is of other data.
        """
        if not {"seed", "fingerprint"} <= state.keys():
            raise ArgumentError("state", sorted(state), "must be a result of state_dict()")
        if state["fingerprint"] != self.source.fingerprint:
            got = f"{self.source.name}, {len(self.source):,} images, fingerprint {self.source.fingerprint}"
            problem = f"must be the data of the stored run, fingerprint {state['fingerprint']}"
            raise ArgumentError("--data", got, problem)
        if state["seed"] != self.seed:
            self._sampler = Sampler(len(self.source), int(state["seed"]))
            self._store.drop()  # prefetched batches have the old order
        self.position = int(state.get("position", self.position))

    def describe(self) -> str:
        """Return one line: the images, the pipeline that makes them, and why it was selected."""
        source = self.source
        counts = f"{counted(len(source), 'image')}, {counted(source.channels, 'channel')}"
        place = "" if source.path is None else f" from {source.path}"
        kind, reason = self.kind
        text = f"{source.name}: {counts}{place}, at {self.resolution} px by {kind}: {self._store.describe()}; {reason}"
        return printable(text)

    def close(self) -> None:
        """Stop the decoding threads. No batch can be requested afterwards."""
        self._store.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _indices(self, request: BatchRequest) -> np.ndarray:
        return self._sampler.indices(rank_positions(*request))

    def _select(self, resolution: int) -> tuple[Kind, str]:
        """Select the pipeline that makes the images of `resolution`, and say why.

        Raises:
            ArgumentError: the requested pipeline cannot make them.
        """
        source, requested = self.source, self._requested
        if requested in ("auto", "cache"):
            if source.arrays(resolution) is not None:
                return "cache", "prepared"
            size, limit = self._bytes(resolution), readable_size(self._resident_bytes)
            if size <= self._resident_bytes:
                return "cache", f"it fits in {limit}"
            too_large = f"decoded it takes {readable_size(size)}, above {limit} (--resident-gb)"
            if requested == "cache":
                hint = "`fastgan prepare` decodes it once for all runs"
                if source.name == "prepared":
                    hint = f"it was not prepared with --cache-to {resolution}"
                raise ArgumentError("--pipeline", "cache", f"at {resolution} px {too_large}; {hint}; or use auto")
        if requested == "torch":
            return "torch", "as requested"
        no_dali = dali.unsupported_reason(source, resolution)
        if requested == "dali":
            if no_dali:
                raise ArgumentError("--pipeline", "dali", f"must be auto or torch; {no_dali}")
            return "dali", "as requested"
        why = f"{too_large}, and {no_dali}" if no_dali else too_large
        files = source.encoded(resolution)
        side = source.resolution if files is None else files.side
        if resolution < side:
            why += f"; each image is decoded at {side} px every time, which `fastgan prepare` avoids"
        return ("torch", why) if no_dali else ("dali", why)

    def _open_store(self, resolution: int) -> ImageStore:
        source = self.source
        self.kind = self._select(resolution)
        kind = self.kind[0]
        prefetching = self._indices, self._pool, self.device
        if kind == "dali":
            return dali.DaliStore(source, resolution, self._workers, *prefetching)
        if kind == "torch":
            return ThreadedStore(source, resolution, self._workers, *prefetching)
        arrays = source.arrays(resolution)
        if arrays is not None:
            # On the CPU the page cache is in memory already, and shared by all ranks of the machine.
            if self.device.type == "cpu" or self._bytes(resolution) > self._resident_bytes:
                return MappedStore(arrays, *prefetching)
            return ResidentStore(upload_all(arrays, self.device))
        if self._decoded is None and self._bytes(source.resolution) <= self._resident_bytes:
            self._decoded = self._decode(source.resolution)
        images = self._decode(resolution) if self._decoded is None else _shrink(self._decoded, resolution)
        return ResidentStore(torch.from_numpy(images).to(self.device))

    def _bytes(self, resolution: int) -> int:
        return len(self.source) * self.source.channels * resolution**2

    def _decode(self, resolution: int) -> np.ndarray:
        """The whole set: uint8 [N, C, resolution, resolution]."""
        source = self.source
        out = np.empty((len(source), source.channels, resolution, resolution), dtype=np.uint8)

        def fill(index: int) -> None:
            out[index] = source.read(index, resolution)

        # Unlike a loop over futures, `map` cancels the rest when an image cannot be decoded.
        for _ in self._pool.map(fill, range(len(source))):
            pass
        return out


open = Pipeline


def fade(images: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Blend real images with their half resolution while a new resolution fades in.

    Karras 2018, fig. 2: "During a resolution transition, we interpolate between two resolutions of the real
    images, similarly to how the generator output combines two resolutions."

    Args:
        images: float [N, C, r, r], r even.
        alpha: 0-dim tensor in [0, 1], on the images' device (no device-to-host synchronization).

    Returns:
        lerp(2 x 2 means enlarged by repetition, images, alpha), in the images' shape and dtype.
    """
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="nearest")
    return torch.lerp(coarse, images, alpha.to(images))


def mirrored(seed: int, positions: np.ndarray) -> np.ndarray:
    """Return whether the sample at each position (int64 [n]) is flipped: int64 [n] of 0 and 1.

    The top bit of SplitMix64 (Steele 2014) at step `position` of a stream whose state is the mixed seed. Without
    mixing, seeds that differ by a multiple of the step would give one sequence, shifted.
    """
    return (splitmix64(_flip_state(seed) + positions * GOLDEN_GAMMA) < 0).astype(np.int64)


@functools.lru_cache(maxsize=8)
def _flip_state(seed: int) -> np.ndarray:
    """The state of a seed's stream of flips: int64 [1]."""
    return splitmix64(np.array([signed64(seed ^ 0x6D6972726F72)], dtype=np.int64))


def _shrink(images: np.ndarray, resolution: int) -> np.ndarray:
    """`area_average` of the whole set in pieces, because its sums take four bytes per value."""
    if images.shape[-1] == resolution:
        return images
    parts = (images[i : i + 1024] for i in range(0, len(images), 1024))
    return np.concatenate([area_average(part, resolution) for part in parts])


def _decoding_threads() -> int:
    """This rank's share of the machine's cores, at most 8: more threads of one process wait for the GIL."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and DeepSpeed's launcher
    return max(1, min(8, cpu_count() // max(ranks, 1)))
