"""Statistics of a stream of images: what the metrics need of one set, real or generated, in bounded memory.

They can be stored, loaded, and merged with those of other ranks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan.evaluation import ranks
from fastgan.evaluation.classes import ClassScore, ModeCounts
from fastgan.evaluation.features import Extractor
from fastgan.evaluation.frechet import Moments
from fastgan.evaluation.similarity import PairSimilarity
from fastgan.evaluation.sliced_wasserstein import Patches
from fastgan.evaluation.statistic import IndexedRows
from fastgan.utils.files import write_atomic

MAX_FEATURE_ROWS = 10_000  # feature vectors for the metrics in memory (neighbors.py)
MAX_PAIRED = 20_000  # images in the pairs of MS-SSIM
_SAVE_SECONDS = 10.0


class FeatureRows(IndexedRows):
    """Feature vectors of the images with an index below `limit`."""

    KEY = "rows"

    def update(self, indices: Tensor, features: Tensor) -> None:
        used = indices < self.limit
        self._indices.append(indices[used])
        self._tensors.append([features.cpu()[used]])

    def rows(self) -> Tensor:
        """float32 [N, D], in the order of the images."""
        return self.tensors()[0]


class ImageStatistics:
    """What `metrics` need of one set of images.

    Args:
        metrics: as in `--metrics`.
        extractor: source of the features; not called, and may be None, if no metric needs any.
        channels: channels of the images.
        swd_images: number of images whose patches are stored.
        seed: seed of the patches' positions.
        generated: whether the images are generated; "is" and "modes" need statistics of these only.
    """

    def __init__(
        self,
        metrics: Iterable[str],
        extractor: Extractor | None,
        channels: int,
        swd_images: int,
        seed: int,
        generated: bool,
    ) -> None:
        metrics = self.metrics = set(metrics)
        self._extractor = extractor
        self.count = 0
        self.moments = Moments(extractor.dimension) if extractor is not None and "fid" in metrics else None
        self.rows = FeatureRows(MAX_FEATURE_ROWS) if metrics & {"kid", "prdc"} else None
        self.similarity = PairSimilarity() if "msssim" in metrics else None
        stream = "generated" if generated else "real"
        self.patches = Patches(seed, stream, swd_images) if "swd" in metrics else None
        self.score = ClassScore() if "is" in metrics and generated else None
        self.modes = ModeCounts(10, channels) if "modes" in metrics and generated else None

    def update(self, indices: Tensor, images: Tensor) -> None:
        """Add images `indices` (int64 [N], pairs together, even index first), uint8 [N, C, R, R] on any device."""
        if self.moments or self.rows or self.score or self.modes:
            assert self._extractor is not None
            features, logits = self._extractor(images)
            if self.moments is not None:
                self.moments.update(features)
            if self.rows is not None:
                self.rows.update(indices, features)
            if self.score is not None:
                assert logits is not None
                self.score.update(indices, logits[:, 0])
            if self.modes is not None:
                assert logits is not None
                self.modes.update(logits.softmax(dim=2))
        if self.patches is not None:
            self.patches.update(indices, images)
        pairs = int((indices < MAX_PAIRED).sum()) // 2
        if self.similarity is not None and pairs:
            self.similarity.update(images[: 2 * pairs])
        self.count += len(indices)

    def _parts(self) -> dict[str, Any]:
        names = ("moments", "rows", "similarity", "patches", "score", "modes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def state(self) -> dict[str, Tensor]:
        """All statistics as tensors by name."""
        state = {"count": torch.tensor(self.count)}
        for name, part in self._parts().items():
            state |= {f"{name}.{key}": value for key, value in part.state().items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace all statistics by those of `state`."""
        self.count = int(state["count"])
        for name, part in self._parts().items():
            part.load_state({key.removeprefix(f"{name}."): state[key] for key in state if key.startswith(f"{name}.")})

    def merge(self, other: ImageStatistics) -> None:
        """Add the images of another rank."""
        for name, part in self._parts().items():
            part.merge(getattr(other, name))
        self.count += other.count


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    write_atomic(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file of `write_tensors`; None if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _file_of_rank(partial: Path) -> Path:
    rank, size = ranks.rank_and_size()
    return partial.with_name(f"{partial.name}.rank{rank}of{size}")


def remove_partial(partial: Path | None) -> None:
    """Remove what `collect_statistics` stored on this rank."""
    if partial is not None:
        _file_of_rank(partial).unlink(missing_ok=True)


def collect_statistics(
    new: Callable[[], ImageStatistics],
    images: Callable[[Tensor], Tensor],
    total: int,
    *,
    batch: int,
    partial: Path | None,
    progress: Callable[[int], object],
) -> ImageStatistics | None:
    """Statistics of images 0 to `total` - 1; each rank reads its share of the batches. A collective.

    Args:
        new: makes empty statistics.
        images: indices int64 [n] -> images, uint8 [n, C, R, R].
        batch: batch size, even. Batches are the same however often the work is interrupted.
        partial: file to which the statistics are written from time to time, and from which interrupted work resumes;
            each rank appends a suffix. It stays until `remove_partial`. None: nothing is stored.
        progress: called with the number of images done since the last call, on all ranks (estimated from this one).

    Returns:
        The statistics of all ranks on the first rank, None on others.
    """
    rank, size = ranks.rank_and_size()
    statistics, next_batch = new(), rank
    if partial is not None:
        partial = _file_of_rank(partial)
        stored = read_tensors(partial)
        if stored is not None:
            next_batch = int(stored.pop("done"))
            statistics.load_state(stored)
    batches = -(-total // batch)
    save = _Saver(statistics, partial)
    progress(min(total, (next_batch - rank) * batch))
    for i in range(next_batch, batches, size):
        indices = torch.arange(i * batch, min((i + 1) * batch, total))
        statistics.update(indices, images(indices))
        progress(len(indices) if size == 1 else min(total - i * batch, size * batch))
        save.if_due(i + size)
    if partial is not None and partial.exists():
        save(max(next_batch, batches + rank))  # what follows may be interrupted too
    states = ranks.gather(statistics.state())
    if states is None:
        return None
    merged = new()
    for state in states:
        other = new()
        other.load_state(state)
        merged.merge(other)
    return merged


class _Saver:
    """Writes statistics at most every ten seconds, and so that writing takes at most a twentieth of the time."""

    def __init__(self, statistics: ImageStatistics, file: Path | None) -> None:
        self._statistics, self._file = statistics, file
        self._saved, self._interval = time.monotonic(), _SAVE_SECONDS

    def if_due(self, next_batch: int) -> None:
        if self._file is not None and time.monotonic() - self._saved > self._interval:
            self(next_batch)

    def __call__(self, next_batch: int) -> None:
        assert self._file is not None
        started = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk costs the ability to resume, not the result
            write_tensors({"done": torch.tensor(next_batch), **self._statistics.state()}, self._file)
        self._saved = time.monotonic()
        self._interval = max(_SAVE_SECONDS, 20 * (self._saved - started))
