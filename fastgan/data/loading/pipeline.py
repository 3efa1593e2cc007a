"""Batches on the device, by position. A faster way to the same images is another `Store`."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F

from fastgan.data.images import area_average
from fastgan.data.loading import dali
from fastgan.data.loading.cache import Mapped, Resident, upload_all
from fastgan.data.loading.gather import finish
from fastgan.data.loading.image_store import Call, Store, count, upload
from fastgan.data.loading.sampler import Sampler, rank_positions
from fastgan.data.loading.threads import Threads
from fastgan.data.source import Source
from fastgan.data.sources import open_source
from fastgan.errors import ArgumentError
from fastgan.utils.system import cpu_count
from fastgan.utils.text import readable_size

# `open` hides the builtin on purpose, for callers that write `fastgan.data.open(...)`.
__all__ = ["KINDS", "Batch", "Kind", "Pipeline", "fade", "open"]

Kind = Literal["auto", "cache", "dali", "torch"]
KINDS: tuple[Kind, ...] = ("auto", "cache", "dali", "torch")


class Batch(NamedTuple):
    """What one rank trains on, all on the device.

    images: float32 [n, C, r, r] in [-1, 1]; labels: int64 [n] or None; positions in the run: int64 [n].
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor


def open(
    source: Source | str,
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
) -> Pipeline:
    """Batches of `source` for one rank.

    source: from `open_source`, or what `--data` may say. resolution: of the images now, px. batch: images of a batch
    over all ranks, for iteration. seed: of order and flips. mirror: flip half of the samples left to right.

    pipeline: "cache" gathers decoded images, "dali" and "torch" decode a batch ahead; "auto" takes the first that can,
    in that order, and `describe` says why. workers: decoding threads, 0 for a share of the cores, at most 8.
    resident_bytes: a set that takes no more than this as uint8 is decoded once and kept on the device; None for 1 GiB,
    or a quarter of a GPU's free memory. target: the highest resolution that `set_resolution` may ask of a `source`
    given as text; None: `resolution`.

    Raises: ArgumentError if the source cannot be opened or does not have the resolution, if `pipeline` cannot make
    its images up to the target, or for a rank outside its world, a batch that does not divide, or a negative count.
    """
    if workers < 0:
        raise ArgumentError("--workers", workers, "must be 0 (a share of the cores, at most 8) or more")
    if resident_bytes is not None and resident_bytes < 0:
        raise ArgumentError("resident_bytes", resident_bytes, "must be at least 0 bytes")
    if pipeline not in KINDS:
        raise ArgumentError("--pipeline", pipeline, f"must be {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    rank_positions(0, max(world, 1) if batch is None else batch, rank, world)  # raises if one of them is out of range
    if isinstance(source, str):
        source = open_source(source, target or resolution)
    source.check_resolution(resolution)
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        # Its number now: to a thread of ours the current device is another.
        place = torch.device("cuda", torch.cuda.current_device())
    if resident_bytes is None:
        resident_bytes = 2**30 if place.type != "cuda" else torch.cuda.mem_get_info(place)[0] // 4
    threads = workers or _decoding_threads()
    return Pipeline(source, resolution, batch, seed, rank, world, place, mirror, pipeline, threads, resident_bytes)


class Pipeline:
    """Batches by position: the same call gives the same batch, whatever was asked for before. See `open`.

    Iterating goes on from `position` without end, over the ends of epochs.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        batch: int | None,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        mirror: bool,
        pipeline: Kind,
        workers: int,
        resident_bytes: int,
    ) -> None:
        self.source = source
        self.device = device
        self.mirror = mirror
        self.batch_size = batch
        self.position = 0
        self._rank, self._world = rank, world
        self._asked, self._workers, self._resident_bytes = pipeline, workers, resident_bytes
        self._sampler = Sampler(len(source), seed)
        # What was asked for must last to the end of the run: better refused now than after days.
        self._choose(source.resolution)
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

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Go on at another resolution, in the same order and with the same flips, and with another batch if given.

        Source, order, labels, threads and what is decoded or mapped stay.

        Raises: ArgumentError if the source does not have it, or the batch does not divide over the ranks.
        """
        self.source.check_resolution(resolution)
        if batch is not None:
            rank_positions(0, batch, self._rank, self._world)
            self.batch_size = batch
        if resolution == self.resolution:
            return
        self._store.close()
        self._store = self._open_store(resolution)
        self.resolution = resolution

    def batch(self, start: int, size: int, *, rank: int | None = None, world: int | None = None) -> Batch:
        """This rank's share of the global batch of `size` at position `start`: n = size / world samples.

        rank, world: instead of the pipeline's own, for gradient accumulation over virtual ranks. `position` is then
        the end of that batch.

        Raises: ArgumentError if `size` does not divide by `world`, `start` is negative, or an image cannot be
        decoded.
        """
        rank = self._rank if rank is None else rank
        call = Call(start, size, rank, self._world if world is None else world)
        positions = rank_positions(*call)
        indices = self._sampler.indices(positions)
        flips = mirrored(self.seed, positions) if self.mirror else None
        if self.device.type == "cpu":
            where, which = torch.from_numpy(positions), torch.from_numpy(indices)
            images = finish(self._store.take(call, indices, which), flips)
        else:
            rows = [positions, indices]
            if flips is not None:
                # Rows of the batch and its mirror image, one below the other.
                rows.append(np.arange(len(positions)) + len(positions) * flips)
            where, which, *chosen = upload(torch.from_numpy(np.stack(rows)), self.device)
            images = self._store.take(call, indices, which)
            if flips is not None:
                # Bytes are turned round and chosen, which takes a sixth of the time of `torch.where`.
                images = torch.cat([images, images.flip(3)]).index_select(0, chosen[0])
            images = images.float().div_(127.5).sub_(1)
        labels = None if self._labels is None else self._labels[which]
        self.position = start + size
        return Batch(images, labels, where)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self.batch_size is None:
            raise ArgumentError("batch", None, "to be iterated, a pipeline must be opened with a batch")
        return self.batch(self.position, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs: {"position": int, "seed": int, "fingerprint": str}, the same on every rank."""
        return {"position": self.position, "seed": self.seed, "fingerprint": self.source.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stored run was, with its seed; with another world or batch too, no image is lost or repeated.

        Raises: ArgumentError if the state is of other data.
        """
        if not {"seed", "fingerprint"} <= state.keys():
            raise ArgumentError("state", sorted(state), "must be what state_dict() gave: position, seed, fingerprint")
        if state["fingerprint"] != self.source.fingerprint:
            was = f"{self.source.name}, {len(self.source):,} images, fingerprint {self.source.fingerprint}"
            stored = f"must be the data of the stored run, fingerprint {state['fingerprint']}"
            raise ArgumentError("--data", was, stored)
        if state["seed"] != self.seed:
            self._sampler = Sampler(len(self.source), int(state["seed"]))
            # What was read ahead follows the old order; a resident set answers by index.
            self._store.drop()
        self.position = int(state.get("position", self.position))

    def describe(self) -> str:
        """One line: what the images are, how they come, and why so."""
        source = self.source
        counts = f"{count(len(source), 'image')}, {count(source.channels, 'channel')}"
        place = "" if source.path is None else f" from {source.path}"
        kind, reason = self.kind
        return f"{source.name}: {counts}{place}, at {self.resolution} px by {kind}: {self._store.describe()}; {reason}"

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

    def _choose(self, resolution: int) -> tuple[Kind, str]:
        """Which pipeline makes the images of `resolution`, and why.

        Raises: ArgumentError if it is not the one that was asked for.
        """
        source, asked = self.source, self._asked
        fits = self._bytes(resolution) <= self._resident_bytes
        if asked in ("auto", "cache"):
            if source.arrays(resolution) is not None:
                return "cache", "prepared"
            if fits:
                return "cache", f"it fits in {readable_size(self._resident_bytes)}"
            takes, limit = readable_size(self._bytes(resolution)), readable_size(self._resident_bytes)
            too_large = f"decoded it takes {takes}, above {limit} (--resident-gb)"
            if asked == "cache":
                where = "`fastgan prepare` decodes it once for all runs"
                if source.name == "prepared":
                    where = f"it was not prepared with --cache-to {resolution}"
                may_be = f"at {resolution} px {too_large}; {where}; or it may be auto"
                raise ArgumentError("--pipeline", "cache", may_be)
        if asked == "torch":
            return "torch", "as asked for"
        no_dali = dali.fault(source, resolution)
        if asked == "dali":
            if no_dali:
                raise ArgumentError("--pipeline", "dali", f"must be auto or torch; {no_dali}")
            return "dali", "as asked for"
        why = f"{too_large}, and {no_dali}" if no_dali else too_large
        files = source.encoded(resolution)
        side = source.resolution if files is None else files.side
        if resolution < side:
            why += f"; each image is decoded at {side} px again and again, which `fastgan prepare` ends"
        return ("torch", why) if no_dali else ("dali", why)

    def _open_store(self, resolution: int) -> Store:
        source = self.source
        self.kind = self._choose(resolution)
        kind = self.kind[0]
        if kind == "dali":
            return dali.Dali(source, resolution, self.device, self._pool, self._workers, self._indices)
        if kind == "torch":
            return Threads(source, resolution, self.device, self._pool, self._workers, self._indices)
        arrays = source.arrays(resolution)
        if arrays is not None:
            # On a CPU the page cache is memory already, shared by all ranks of the machine.
            if self.device.type == "cpu" or self._bytes(resolution) > self._resident_bytes:
                return Mapped(arrays, self.device, self._pool, self._indices)
            return Resident(upload_all(arrays, self.device))
        if self._decoded is None and self._bytes(source.resolution) <= self._resident_bytes:
            self._decoded = self._decode(source.resolution)
        images = self._decode(resolution) if self._decoded is None else _shrink(self._decoded, resolution)
        return Resident(torch.from_numpy(images).to(self.device))

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
    step = np.uint64(0x9E3779B97F4A7C15)
    return (_mix(_flip_stream(seed) + positions.astype(np.uint64) * step) >> np.uint64(63)).astype(np.int64)


@functools.lru_cache(maxsize=8)
def _flip_stream(seed: int) -> np.ndarray:
    """The state of a seed's stream of flips: uint64 [1]."""
    return _mix(np.array([(seed ^ 0x6D6972726F72) % 2**64], dtype=np.uint64))


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


def _decoding_threads() -> int:
    """This rank's share of the machine's cores, at most 8: beyond that, threads of one process wait for its lock."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and DeepSpeed's launcher
    return max(1, min(8, cpu_count() // max(ranks, 1)))
