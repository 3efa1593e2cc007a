"""Batches on the device, by position. A faster way to the same images is another `Store`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F

from fastgan.data.sampler import Sampler, rank_positions
from fastgan.data.sources import Source, area_average
from fastgan.errors import ArgumentError

# `open` hides the builtin on purpose, for callers that write `fastgan.data.open(...)`.
__all__ = ["Batch", "Call", "Pipeline", "Store", "fade", "open"]


class Batch(NamedTuple):
    """What one rank trains on, all on the device.

    images: float32 [n, C, r, r] in [-1, 1]; labels: int64 [n] or None; positions in the run: int64 [n].
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor


class Call(NamedTuple):
    """One request: share `rank` of `world` of the global batch of `size` at position `start`."""

    start: int
    size: int
    rank: int
    world: int


class Store(Protocol):
    """The images of one source at one resolution, however kept: the seam for a prepared cache or DALI."""

    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        """The images `indices` (int64 [n], on the host and again on the device): uint8 [n, C, r, r] there."""

    def describe(self) -> str:
        """How they are kept, to follow "at 64 px"."""

    def close(self) -> None:
        """Drop what is under way."""


def open(
    source: Source,
    *,
    resolution: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    mirror: bool = False,
    workers: int = 0,
    resident_bytes: int = 2**30,
) -> Pipeline:
    """Batches of `source` for one rank.

    resolution: of the images now, px. seed: of order and flips. mirror: flip half of the samples left to
    right. workers: decoding threads, 0 for one per core, at most 8. resident_bytes: a set that takes no more
    than this as uint8 is decoded once and kept on the device; a larger one is decoded a batch ahead.

    Raises: ArgumentError if the source does not have the resolution, or for a rank outside its world
    or a negative count.
    """
    if workers < 0:
        raise ArgumentError("--workers", workers, "it may be 0 (one per core, at most 8) or more")
    if resident_bytes < 0:
        raise ArgumentError("resident_bytes", resident_bytes, "it may be 0 or more bytes")
    rank_positions(0, max(world, 1), rank, world)  # raises if one of them is out of range
    source.check_resolution(resolution)
    place = torch.device(device)
    return Pipeline(source, resolution, seed, rank, world, place, mirror, workers or _cores(), resident_bytes)


class Pipeline:
    """Batches by position: the same call gives the same batch, whatever was asked for before. See `open`."""

    def __init__(
        self,
        source: Source,
        resolution: int,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        mirror: bool,
        workers: int,
        resident_bytes: int,
    ) -> None:
        self.source = source
        self.device = device
        self.mirror = mirror
        self._rank, self._world = rank, world
        self._workers, self._resident_bytes = workers, resident_bytes
        self._sampler = Sampler(len(source), seed)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fastgan-data")
        self._labels = None if source.labels is None else torch.from_numpy(source.labels).to(device)
        # The set at the target size, on the host, once it was decoded: lower resolutions follow from it.
        self._decoded: np.ndarray | None = None
        self.resolution = resolution
        self._store = self._open_store(resolution)

    @property
    def seed(self) -> int:
        """The seed of order and flips; a loaded state brings its own."""
        return self._sampler.seed

    def set_resolution(self, resolution: int) -> None:
        """Go on at another resolution, in the same order and with the same flips.

        Nothing is decoded again where the set at the target size fits `resident_bytes`.

        Raises: ArgumentError if the source does not have it.
        """
        self.source.check_resolution(resolution)
        if resolution == self.resolution:
            return
        self._store.close()
        self._store = self._open_store(resolution)
        self.resolution = resolution

    def batch(self, start: int, size: int, *, rank: int | None = None, world: int | None = None) -> Batch:
        """This rank's share of the global batch of `size` at position `start`: n = size / world samples.

        rank, world: instead of the pipeline's own, for gradient accumulation over virtual ranks.

        Raises: ArgumentError if `size` does not divide by `world`, `start` is negative, or an image cannot be
        decoded.
        """
        rank = self._rank if rank is None else rank
        call = Call(start, size, rank, self._world if world is None else world)
        positions = rank_positions(*call)
        indices = self._sampler.indices(positions)
        rows = [positions, indices, mirrored(self.seed, positions)] if self.mirror else [positions, indices]
        on_device = _upload(np.stack(rows), self.device)
        images = self._store.take(call, indices, on_device[1])
        if self.mirror:
            images = torch.where(on_device[2].bool()[:, None, None, None], images.flip(3), images)
        labels = None if self._labels is None else self._labels[on_device[1]]
        return Batch(images.float().div_(127.5).sub_(1), labels, on_device[0])

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the position: {"seed": int, "fingerprint": str}."""
        return {"seed": self.seed, "fingerprint": self.source.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the seed of a stored run.

        Raises: ArgumentError if the state is of other data.
        """
        if not {"seed", "fingerprint"} <= state.keys():
            raise ArgumentError("state", sorted(state), "it may be what state_dict() gave: seed, fingerprint")
        if state["fingerprint"] != self.source.fingerprint:
            was = f"{self.source.name}, {len(self.source):,} images, fingerprint {self.source.fingerprint}"
            stored = f"it may be the data of the stored run, fingerprint {state['fingerprint']}"
            raise ArgumentError("--data", was, stored)
        if state["seed"] != self.seed:
            self._sampler = Sampler(len(self.source), int(state["seed"]))
            # What was read ahead follows the old order; a resident set answers by index.
            self._store.close()

    def describe(self) -> str:
        """One line: what the images are and how they come."""
        source = self.source
        counts = f"{_count(len(source), 'image')}, {_count(source.channels, 'channel')}"
        place = "" if source.path is None else f" from {source.path}"
        return f"{source.name}: {counts}, at {self.resolution} px {self._store.describe()}{place}"

    def close(self) -> None:
        """End the decoding threads. Batches can no longer be asked for."""
        self._store.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _indices(self, call: Call) -> np.ndarray:
        return self._sampler.indices(rank_positions(*call))

    def _open_store(self, resolution: int) -> Store:
        source = self.source
        if self._bytes(resolution) > self._resident_bytes:
            return _Streamed(source, resolution, self.device, self._pool, self._workers, self._indices)
        if self._decoded is None and self._bytes(source.resolution) <= self._resident_bytes:
            self._decoded = self._decode(source.resolution)
        images = self._decode(resolution) if self._decoded is None else _shrink(self._decoded, resolution)
        return _Resident(torch.from_numpy(images).to(self.device))

    def _bytes(self, resolution: int) -> int:
        return len(self.source) * self.source.channels * resolution**2

    def _decode(self, resolution: int) -> np.ndarray:
        """The whole set: uint8 [N, C, resolution, resolution]."""
        source = self.source
        out = np.empty((len(source), source.channels, resolution, resolution), dtype=np.uint8)

        def fill(index: int) -> None:
            out[index] = source.read(index, resolution)

        # Unlike futures waited for one by one, `map` calls off the rest when an image cannot be decoded.
        for _ in self._pool.map(fill, range(len(source))):
            pass
        return out


class _Resident:
    """All images in one tensor on the device."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = images

    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        return self._images.index_select(0, on_device)

    def describe(self) -> str:
        place = "memory" if self._images.device.type == "cpu" else f"memory of {self._images.device}"
        return f"in {place} ({self._images.numel() / 1e6:.1f} MB)"

    def close(self) -> None:
        pass


class _Streamed:
    """Images decoded by threads, a batch ahead: after a call, the same share of the next global batch.

    A call that was not foreseen is decoded when it comes, so jumping costs time and nothing else.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        device: torch.device,
        pool: ThreadPoolExecutor,
        workers: int,
        indices_of: Callable[[Call], np.ndarray],
    ) -> None:
        self._source, self._resolution, self._device = source, resolution, device
        self._pool, self._workers, self._indices_of = pool, workers, indices_of
        self._ahead: dict[Call, list[Future[np.ndarray]]] = {}

    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        following = call._replace(start=call.start + call.size)
        # Virtual ranks ask for the shares of one global batch in turn: keep those of this and the next.
        for other in [one for one in self._ahead if one.start not in (call.start, following.start)]:
            self._drop(other)
        reads = self._ahead.pop(call, None) or self._start(indices)
        if following not in self._ahead:
            self._ahead[following] = self._start(self._indices_of(following))
        return _upload(np.stack([read.result() for read in reads]), self._device)

    def describe(self) -> str:
        return f"decoded by {_count(self._workers, 'thread')}"

    def close(self) -> None:
        for call in list(self._ahead):
            self._drop(call)

    def _start(self, indices: np.ndarray) -> list[Future[np.ndarray]]:
        return [self._pool.submit(self._source.read, int(index), self._resolution) for index in indices]

    def _drop(self, call: Call) -> None:
        for read in self._ahead.pop(call):
            read.cancel()


def fade(images: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Real images while a new resolution fades in: at alpha 0 the half resolution enlarged, at 1 as they are.

    images: float [N, C, r, r], r even; alpha: 0-dim tensor in [0, 1], on the images' device so that nothing
    is read back. Returns lerp(nearest-enlarged mean of 2 x 2, images, alpha) in the images' shape and dtype.

    Karras 2018, fig. 2: "During a resolution transition, we interpolate between two resolutions of the real
    images, similarly to how the generator output combines two resolutions."
    """
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="nearest")
    return torch.lerp(coarse, images, alpha.to(images))


def mirrored(seed: int, positions: np.ndarray) -> np.ndarray:
    """Whether each position's sample is flipped: int64 [n] of 0 and 1, from `(seed, position)` only.

    The top bit of SplitMix64 (Steele 2014) at step `position` of a stream whose state is the mixed seed;
    unmixed, seeds that differ by a multiple of its step would give one sequence, shifted.
    """
    base = _mix(np.array([(seed ^ 0x6D6972726F72) % 2**64], dtype=np.uint64))
    step = np.uint64(0x9E3779B97F4A7C15)
    return (_mix(base + positions.astype(np.uint64) * step) >> np.uint64(63)).astype(np.int64)


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 [n] to uint64 [n]."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _shrink(images: np.ndarray, resolution: int) -> np.ndarray:
    """`area_average` of the whole set, some at a time: its sums take four bytes per value."""
    if images.shape[-1] == resolution:
        return images
    parts = (images[i : i + 1024] for i in range(0, len(images), 1024))
    return np.concatenate([area_average(part, resolution) for part in parts])


def _upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A batch to the device, without waiting for it: from pinned memory where that exists."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _cores() -> int:
    """Cores this process may use, at most 8: beyond that, threads of one process wait for Python's lock."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)
