"""Evaluation of a generator against real images: which metrics, over how many images, with what cached."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.data import Source
from fastgan.errors import ArgumentError
from fastgan.evaluation import ranks
from fastgan.evaluation.collect import (
    MAX_FEATURE_ROWS,
    MAX_PAIRED,
    ImageStatistics,
    collect_statistics,
    read_tensors,
    remove_partial,
    write_tensors,
)
from fastgan.evaluation.compare import compare
from fastgan.evaluation.features import INCEPTION, Extractor
from fastgan.evaluation.similarity import scales
from fastgan.evaluation.sliced_wasserstein import PATCH, bytes_of_patches

METRICS = ("fid", "kid", "is", "prdc", "swd", "msssim", "modes")
PIXEL_METRICS = ("swd", "msssim")
DIGITS = ("digits", "stacked-digits")
_MIN_IMAGES = {"fid": 2, "kid": 2, "prdc": 6, "msssim": 2, "swd": 1, "is": 1, "modes": 1}
_SCHEMA = 2
# Karras et al. 2018 compare 16,384 images. Fewer are used if their patches would need more than _SWD_BYTES.
_SWD_IMAGES = 16_384
_SWD_BYTES = 2**31

Draw = Callable[[Tensor], Tensor]
Empty = Callable[..., ImageStatistics]


def default_extractor(source: Source) -> str:
    """Name of the default features for a set of images."""
    return "digits" if source.name in DIGITS else INCEPTION


def needs_features(metrics: Iterable[str] | None) -> bool:
    """Whether any of `metrics` (None: all) is computed from features."""
    return metrics is None or not set(metrics) <= set(PIXEL_METRICS)


def choose_metrics(
    requested: Sequence[str] | None, extractor: Extractor | None, source: Source, resolution: int
) -> list[str]:
    """The metrics to compute, in the order of `METRICS`.

    Args:
        requested: metrics by name; None: all that can be computed.
        extractor: source of the features; None if only `PIXEL_METRICS` are requested.

    Raises:
        ArgumentError: a metric does not exist or cannot be computed.
    """
    unsupported = {}
    if extractor is not None and not extractor.has_class_score:
        unsupported["is"] = f"--features {extractor.name} does not classify whole images"
    if resolution < PATCH:
        unsupported["swd"] = f"its patches need images of at least {PATCH} px, these have {resolution} px"
    if not scales(resolution):
        unsupported["msssim"] = f"its window needs images of at least 11 px, these have {resolution} px"
    if extractor is None or extractor.name != "digits" or source.name not in DIGITS:
        unsupported["modes"] = f"it needs --features digits and --data {' or '.join(DIGITS)}, whose modes are known"
    if requested is None:
        return [name for name in METRICS if name not in unsupported]
    for name in requested:
        if name not in METRICS:
            raise ArgumentError("--metrics", name, f"must be {', '.join(METRICS)}, separated by commas")
        if name in unsupported:
            raise ArgumentError("--metrics", name, f"cannot be computed here: {unsupported[name]}")
    return [name for name in METRICS if name in requested]


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation; a call performs it.

    Attributes:
        metrics: as returned by `choose_metrics`.
        extractor: source of the features; None if `metrics` are all `PIXEL_METRICS`.
        n: number of generated images.
        seed: seed of subsets, patches and projections.
        cache: folder for the statistics of real images; None: no cache.
        partial: file from which an interrupted evaluation resumes, of one generator and one seed of its images; None:
            not stored.
        progress: show progress bars.
    """

    metrics: Sequence[str]
    extractor: Extractor | None
    n: int
    seed: int = 0
    cache: Path | None = None
    partial: Path | None = None
    progress: bool = False

    def __call__(
        self, draw: Draw, source: Source, resolution: int, warn: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Compare generated with real images. A collective: all ranks call it with the same arguments.

        Args:
            draw: indices int64 [n] -> generated images, uint8 [n, C, resolution, resolution].
            source: the real images, with C channels; all of them are used.
            warn: called on the first rank with each reason why a number is less reliable.

        Returns:
            {"metrics": {name: value}, "images": {name: number of images used}} on the first rank, None on others.

        Raises:
            ArgumentError: there are too few images for a metric.
        """
        self.require_enough_images(source)
        swd_images = min(self.n, len(source), _SWD_IMAGES, _SWD_BYTES // bytes_of_patches(resolution, source.channels))
        new = functools.partial(
            ImageStatistics, extractor=self.extractor, channels=source.channels, swd_images=swd_images, seed=self.seed
        )
        real = self._real_statistics(functools.partial(new, generated=False), source, resolution, swd_images)
        empty = functools.partial(new, self.metrics, generated=True)
        generated = self._collect("generated images", empty, draw, self.n, resolution, self.partial)
        return None if generated is None else compare(generated, real, source, self.metrics, self.seed, warn)

    def require_enough_images(self, source: Source) -> None:
        """Raises ArgumentError for --n or --data if there are too few images for a metric."""
        for name in self.metrics:
            if self.n < _MIN_IMAGES[name]:
                raise ArgumentError("--n", self.n, f"must be at least {_MIN_IMAGES[name]} for {name}")
            if len(source) < _MIN_IMAGES[name]:
                problem = f"it has {len(source):,} images, and {name} needs at least {_MIN_IMAGES[name]}"
                raise ArgumentError("--data", source.name, problem)

    def _batch_size(self, resolution: int) -> int:
        return 256 if resolution <= 64 else 64

    def _collect(
        self, name: str, new: Empty, images: Draw, total: int, resolution: int, partial: Path | None
    ) -> ImageStatistics | None:
        batch = self._batch_size(resolution)
        with self._progress_bar(name, total) as advance:
            return collect_statistics(new, images, total, batch=batch, partial=partial, progress=advance)

    def _real_statistics(self, new: Empty, source: Source, resolution: int, swd_images: int) -> ImageStatistics:
        """Statistics of the real images, complete on the first rank: from the cache, except for patches."""
        metrics = set(self.metrics) - {"is", "modes"}
        with _reader(source, resolution) as images:
            real = self._cached_statistics(functools.partial(new, metrics - {"swd"}), images, source, resolution)
            if "swd" in metrics:
                empty = functools.partial(new, {"swd"})
                collected = self._collect("patches of real images", empty, images, swd_images, resolution, None)
                if collected is not None:
                    real.patches = collected.patches
        return real

    def _cached_statistics(self, new: Empty, images: Draw, source: Source, resolution: int) -> ImageStatistics:
        """Statistics of the real images that are cached, complete on the first rank."""
        real = new()
        metrics = real.metrics
        if not metrics:
            return real
        total = len(source) if "fid" in metrics else min(len(source), max(MAX_FEATURE_ROWS, MAX_PAIRED))
        file = self._cache_file(source, resolution, metrics, total)
        stored = read_tensors(file) if file is not None and ranks.rank_and_size()[0] == 0 else None
        if ranks.broadcast(stored is not None):
            if stored is not None:
                real.load_state(stored)
            return real
        partial = None if file is None else file.with_name(f".{file.name}.collecting")
        collected = self._collect("real images", new, images, total, resolution, partial)
        if collected is not None and file is not None:
            _write_cache(collected, file)
        remove_partial(partial)
        return real if collected is None else collected

    def _cache_file(self, source: Source, resolution: int, metrics: set[str], total: int) -> Path | None:
        if self.cache is None:
            return None
        extractor = self.extractor if needs_features(metrics) else None
        key = {
            "schema": _SCHEMA,
            "data": [source.name, source.fingerprint, len(source), source.channels, source.resolution, resolution],
            "features": None if extractor is None else [extractor.name, extractor.fingerprint, extractor.resize],
            "metrics": sorted(metrics),
            "images": total,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        file = self.cache / f"{source.name}-{resolution}px-{digest}.safetensors"
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                tempfile.TemporaryFile(dir=self.cache).close()  # the file is written only after all images are read
        except OSError as error:
            problem = f"must name a writable folder ({error.strerror})"
            raise ArgumentError("XDG_CACHE_HOME", str(self.cache.parent.parent), problem) from None
        return file

    @contextmanager
    def _progress_bar(self, name: str, total: int) -> Iterator[Callable[[int], object]]:
        """On the first rank: a bar on a terminal, a line elsewhere."""
        if not self.progress or ranks.rank_and_size()[0] != 0:
            yield lambda count: None
            return
        from tqdm import tqdm

        if not sys.stderr.isatty():
            print(f"{name}: {total:,}", file=sys.stderr, flush=True)
        with tqdm(total=total, desc=name, unit="img", dynamic_ncols=True, disable=None, unit_scale=True) as bar:
            yield bar.update


@contextmanager
def _reader(source: Source, resolution: int) -> Iterator[Draw]:
    """Real images by index, in a fixed shuffled order: files may be sorted by class, and some metrics use a part."""
    order = np.random.default_rng(0).permutation(len(source))
    with ThreadPoolExecutor(4) as pool:

        def images(indices: Tensor) -> Tensor:
            pixels = pool.map(lambda i: source.read(int(i), resolution), order[indices.numpy()])
            return torch.from_numpy(np.stack(list(pixels)))

        yield images


def _write_cache(statistics: ImageStatistics, file: Path) -> None:
    try:
        write_tensors(statistics.state(), file)
    except OSError as error:  # the disk has filled up since `_cache_file`; the statistics are in memory
        reason = f"{file} cannot be written ({error.strerror})"
        print(f"warning: {reason}: the next evaluation reads the real images again", file=sys.stderr, flush=True)
