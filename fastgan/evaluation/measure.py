"""From a way to draw images and a set of real ones to numbers: which metrics, over how many images, how cached."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from fastgan.evaluation import neighbors, ranks
from fastgan.evaluation.collect import KEPT, PAIRED, Collected, discard, read_tensors, stream, write_tensors
from fastgan.evaluation.features import INCEPTION, Extractor
from fastgan.evaluation.frechet import frechet_distance
from fastgan.evaluation.similarity import scales
from fastgan.evaluation.sliced_wasserstein import PATCH, bytes_of_patches, patch_distances

METRICS = ("fid", "kid", "is", "prdc", "swd", "msssim", "modes")
OF_PIXELS = ("swd", "msssim")
DIGITS = ("digits", "stacked-digits")
_SCHEMA = 2
# Karras et al. 2018 compare 16,384 images; patches of more pixels than these bytes hold are of fewer images.
_SWD_IMAGES = 16_384
_SWD_BYTES = 2**31


def default_extractor(source: Source) -> str:
    """The features that a set of images asks for."""
    return "digits" if source.name in DIGITS else INCEPTION


def needs_features(asked: Sequence[str] | None) -> bool:
    """Whether an extractor must be had for the metrics asked for, None being all."""
    return asked is None or not set(asked) <= set(OF_PIXELS)


def choose(asked: Sequence[str] | None, extractor: Extractor | None, source: Source, resolution: int) -> list[str]:
    """The metrics to compute: those asked for, or all that mean something here. extractor: None for `OF_PIXELS` alone.

    Raises:
        ArgumentError: one that does not exist, or means nothing here.
    """
    cannot = {}
    if extractor is not None and not extractor.scores:
        cannot["is"] = f"--features {extractor.name} gives no classes of an image"
    if resolution < PATCH:
        cannot["swd"] = f"its patches need images of {PATCH} px or more, and these have {resolution}"
    if not scales(resolution):
        cannot["msssim"] = f"its window needs images of 11 px or more, and these have {resolution}"
    if extractor is None or extractor.name != "digits" or source.name not in DIGITS:
        cannot["modes"] = f"it needs --features digits and --data {' or '.join(DIGITS)}, whose modes are known"
    if asked is None:
        return [name for name in METRICS if name not in cannot]
    for name in asked:
        if name not in METRICS:
            raise ArgumentError("--metrics", name, f"must be {', '.join(METRICS)}, separated by commas")
        if name in cannot:
            raise ArgumentError("--metrics", name, f"it may be left out: {cannot[name]}")
    return [name for name in METRICS if name in asked]


@dataclass(frozen=True)
class Evaluation:
    """How images are compared.

    metrics, extractor: as for `choose`. n: generated images. seed: of subsets, patches and projections. cache: folder
    for the statistics of real images, or None. partial: file in which an interrupted evaluation is stored, or None;
    whoever names it makes sure that it stands for one generator and one seed of its images. progress: show bars.
    """

    metrics: Sequence[str]
    extractor: Extractor | None
    n: int
    seed: int = 0
    cache: Path | None = None
    partial: Path | None = None
    progress: bool = False

    def __call__(
        self, draw: Callable[[Tensor], Tensor], source: Source, resolution: int, warn: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Compare generated with real images. A collective: every rank calls it, with the same arguments.

        Args:
            draw: the generated images of indices int64 [n], uint8 [n, C, resolution, resolution].
            source: the real images, of the same channels; all of them are used.
            warn: is told, on the first rank, what makes a number say less.

        Returns:
            {"metrics": {name: number}, and with how many images each was made} on the first rank; None on others.

        Raises:
            ArgumentError: there are too few images for a metric.
        """
        self.check(source)
        swd_images = min(self.n, len(source), _SWD_IMAGES, _SWD_BYTES // bytes_of_patches(resolution, source.channels))
        real = self._real(source, resolution, swd_images)
        generated = self._generated(draw, source, resolution, swd_images)
        if generated is None:
            return None
        assert real is not None
        return self._compare(generated, real, source, swd_images, warn)

    def check(self, source: Source) -> None:
        """Raises ArgumentError, of --n or --data, if there are too few images for a metric."""
        least = {"fid": 2, "kid": 2, "prdc": 6, "msssim": 2, "swd": 1, "is": 1, "modes": 1}
        for name in self.metrics:
            if self.n < least[name]:
                raise ArgumentError("--n", self.n, f"must be at least {least[name]} for {name}")
            if len(source) < least[name]:
                may_be = f"it has {len(source):,} images, and {name} needs {least[name]} or more"
                raise ArgumentError("--data", source.name, may_be)

    def _batch(self, resolution: int) -> int:
        return 256 if resolution <= 64 else 64

    def _real(self, source: Source, resolution: int, swd_images: int) -> Collected | None:
        """What the metrics need of the real images: from the cache, except for patches, which it does not keep."""
        wanted = set(self.metrics) - {"is", "modes"}

        def new(metrics: set[str]) -> Collected:
            return Collected(
                metrics,
                self.extractor,
                generated=False,
                channels=source.channels,
                swd_images=swd_images,
                seed=self.seed,
            )

        # Files may be sorted by class: whatever uses some of the images takes them from a shuffled order.
        order = np.random.default_rng(0).permutation(len(source))
        with ThreadPoolExecutor(4) as pool:

            def images(indices: Tensor) -> Tensor:
                read = pool.map(lambda i: source.read(int(i), resolution), order[indices.numpy()])
                return torch.from_numpy(np.stack(list(read)))

            def collect(metrics: set[str], total: int, name: str, partial: Path | None) -> Collected | None:
                with self._bar(name, total) as advance:
                    batch = self._batch(resolution)
                    return stream(lambda: new(metrics), images, total, batch=batch, partial=partial, progress=advance)

            kept = new(wanted - {"swd"})
            if wanted - {"swd"}:
                total = len(source) if "fid" in wanted else min(len(source), max(KEPT, PAIRED))
                file = self._cache_file(source, resolution, wanted - {"swd"}, total)
                stored = read_tensors(file) if file is not None and ranks.rank_and_size()[0] == 0 else None
                if ranks.broadcast(stored is not None):
                    if stored is not None:
                        kept.load_state(stored)
                else:
                    partial = None if file is None else file.with_name(f".{file.name}.collecting")
                    found = collect(wanted - {"swd"}, total, "real images", partial)
                    if found is not None:
                        kept = found
                        if file is not None:
                            self._keep(kept, file)
                    discard(partial)
            if "swd" in wanted:
                found = collect({"swd"}, swd_images, "patches of real images", None)
                if found is not None:
                    kept.patches = found.patches
        return kept if ranks.rank_and_size()[0] == 0 else None

    def _cache_file(self, source: Source, resolution: int, metrics: set[str], total: int) -> Path | None:
        if self.cache is None:
            return None
        of = self.extractor if needs_features(sorted(metrics)) else None
        key = {
            "schema": _SCHEMA,
            "data": [source.name, source.fingerprint, len(source), source.channels, source.resolution, resolution],
            "features": None if of is None else [of.name, of.fingerprint, of.resize],
            "metrics": sorted(metrics),
            "images": total,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        file = self.cache / f"{source.name}-{resolution}px-{digest}.safetensors"
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                tempfile.TemporaryFile(dir=self.cache).close()  # what the real images told is written at the end
        except OSError as error:
            may_be = f"it may name a folder that can be written ({error.strerror})"
            raise ArgumentError("XDG_CACHE_HOME", str(self.cache.parent.parent), may_be) from None
        return file

    def _keep(self, real: Collected, file: Path) -> None:
        try:
            write_tensors(real.state(), file)
        except OSError as error:  # the disk has filled up since; the sums are at hand
            said = f"warning: {file} cannot be written ({error.strerror}): the real images will be read again next time"
            print(said, file=sys.stderr, flush=True)

    def _generated(
        self, draw: Callable[[Tensor], Tensor], source: Source, resolution: int, swd_images: int
    ) -> Collected | None:
        with self._bar("generated images", self.n) as advance:
            return stream(
                lambda: Collected(
                    set(self.metrics),
                    self.extractor,
                    generated=True,
                    channels=source.channels,
                    swd_images=swd_images,
                    seed=self.seed,
                ),
                draw,
                self.n,
                batch=self._batch(resolution),
                partial=self.partial,
                progress=advance,
            )

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar on a terminal, lines elsewhere; on the first rank."""
        if not self.progress or ranks.rank_and_size()[0] != 0:
            yield lambda count: None
            return
        from tqdm import tqdm

        if not sys.stderr.isatty():
            print(f"{name}: {total:,}", file=sys.stderr, flush=True)
        with tqdm(total=total, desc=name, unit="img", dynamic_ncols=True, disable=None, unit_scale=True) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            yield advance

    def _compare(
        self, generated: Collected, real: Collected, source: Source, swd_images: int, warn: Callable[[str], None]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        used: dict[str, Any] = {"generated": self.n, "real": len(source)}
        if generated.moments is not None and real.moments is not None:
            assert self.extractor is not None
            dimension = self.extractor.dimension
            for moments, name in ((real.moments, "real"), (generated.moments, "generated")):
                if moments.count <= dimension:
                    warn(
                        f"fid: {moments.count:,} {name} images for {dimension:,} features: their covariance is "
                        "singular, and the distance is biased upwards"
                    )
            found["frechet_distance"] = frechet_distance(generated.moments, real.moments)
        if generated.rows is not None and real.rows is not None:
            fake_rows, real_rows = generated.rows.rows(), real.rows.rows()
            # Precision, recall and the rest depend on how densely each set lies: both are of one size.
            same = min(len(fake_rows), len(real_rows))
            used["neighbors"] = same
            if "kid" in self.metrics:
                for rows, name in ((real_rows, "real"), (fake_rows, "generated")):
                    if len(rows) == min(neighbors.SUBSET, len(fake_rows), len(real_rows)):
                        warn(
                            f"kid: every subset holds all {len(rows):,} {name} images: the deviation over subsets does "
                            f"not say how they vary; more than {neighbors.SUBSET:,} of each make it do so"
                        )
                mean, deviation = neighbors.kernel_distance(fake_rows, real_rows, seed=self.seed)
                found |= {"kernel_distance": mean, "kernel_distance_std": deviation}
            if "prdc" in self.metrics:
                names = ("precision", "recall", "density", "coverage")
                pair = (fake_rows[:same], real_rows[:same])
                values = (*neighbors.precision_recall(*pair), *neighbors.density_coverage(*pair))
                found |= dict(zip(names, values, strict=True))
        if generated.score is not None:
            classes, part = generated.score.probability.shape[1], self.n // generated.score.PARTS
            if part < classes:
                warn(
                    f"is: {self.n:,} generated images, {part:,} in a tenth, for {classes:,} classes: the score is "
                    "biased downwards, as a tenth cannot show them all"
                )
            found["class_score"], found["class_score_std"] = generated.score.result()
        if generated.patches is not None and real.patches is not None:
            levels = generated.patches.levels()
            distances = patch_distances(levels, real.patches.levels(), self.seed)
            found["swd"] = sum(distances.values()) / len(distances)
            used["swd"] = swd_images
            # A level's side is not in its patches; the finest is the images'.
            found |= {f"swd_level{i}": distance for i, distance in distances.items()}
        if generated.similarity is not None and real.similarity is not None:
            found["ms_ssim"], found["ms_ssim_real"] = generated.similarity.result(), real.similarity.result()
            used["ms_ssim_pairs"] = int(generated.similarity.count)
        if generated.modes is not None:
            expected = expected_modes(source)
            found |= {**generated.modes.result(expected), "modes_of": len(expected)}
        return {"metrics": found, "images": used}


def expected_modes(source: Source) -> Tensor:
    """Probability of each mode of digits, float64 [10^C]: the product of each channel's share of each digit."""
    assert source.labels is not None
    expected = torch.ones(1, dtype=torch.float64)
    for channel in range(source.channels):
        digit = source.labels // 10 ** (source.channels - 1 - channel) % 10
        share = torch.from_numpy(np.bincount(digit, minlength=10) / len(digit))
        expected = (expected[:, None] * share).flatten()
    return expected
