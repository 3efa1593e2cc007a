"""Sums over a stream of images: everything the metrics need of one set, real or generated, in bounded memory.

What images leave behind can be stored and taken up again, and joined with what other ranks have seen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgan.evaluation import ranks
from fastgan.evaluation.classes import ClassScore, ModeCounts
from fastgan.evaluation.features import Extractor
from fastgan.evaluation.frechet import Moments
from fastgan.evaluation.similarity import PairSimilarity
from fastgan.evaluation.sliced_wasserstein import Patches
from fastgan.utils.files import write_atomic

# Feature vectors that are kept for the metrics of neighbors, and images in the pairs of MS-SSIM.
KEPT = 10_000
PAIRED = 20_000
_SAVE_SECONDS = 10.0


class FeatureRows:
    """Feature vectors of the images with an index below `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._indices: list[Tensor] = []
        self._rows: list[Tensor] = []

    def update(self, indices: Tensor, features: Tensor) -> None:
        use = indices < self.limit
        self._indices.append(indices[use])
        self._rows.append(features.cpu()[use])

    def merge(self, other: FeatureRows) -> None:
        self._indices += other._indices
        self._rows += other._rows

    def rows(self) -> Tensor:
        """float32 [kept, D], in the order of the images."""
        return torch.cat(self._rows)[torch.cat(self._indices).argsort()]

    def state(self) -> dict[str, Tensor]:
        if not self._rows:
            return {}
        self._indices, self._rows = [torch.cat(self._indices)], [torch.cat(self._rows)]
        return {"indices": self._indices[0], "rows": self._rows[0]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self._indices, self._rows = [state["indices"]], [state["rows"]]


class Collected:
    """What `metrics` need of one set of images.

    Args:
        metrics: as in `--metrics`.
        extractor: gives the features; it is not called, and may be None, where no metric needs any.
        generated: whether the set is; classes are asked of generated images alone.
        channels: of the images.
        swd_images: images whose patches are kept; seed, stream: where those are cut.
    """

    def __init__(
        self,
        metrics: set[str],
        extractor: Extractor | None,
        *,
        generated: bool,
        channels: int,
        swd_images: int,
        seed: int,
    ) -> None:
        self._extractor = extractor
        self.count = 0
        self.moments = Moments(extractor.dimension) if extractor is not None and "fid" in metrics else None
        self.rows = FeatureRows(KEPT) if metrics & {"kid", "prdc"} else None
        self.similarity = PairSimilarity() if "msssim" in metrics else None
        stream = "generated" if generated else "real"
        self.patches = Patches(seed, stream, swd_images) if "swd" in metrics else None
        self.score = ClassScore(0) if "is" in metrics and generated else None
        self.modes = ModeCounts(10, channels) if "modes" in metrics and generated else None

    def update(self, indices: Tensor, images: Tensor) -> None:
        """Take in images `indices` (int64 [N], even ones first of each pair), uint8 [N, C, R, R] on any device."""
        if self.moments or self.rows or self.score or self.modes:
            assert self._extractor is not None
            features, logits = self._extractor(images)
            if self.moments is not None:
                self.moments.update(features)
            if self.rows is not None:
                self.rows.update(indices, features)
            if self.score is not None:
                assert logits is not None
                if not self.score.probability.shape[1]:
                    self.score = ClassScore(logits.shape[2])
                self.score.update(indices, logits[:, 0])
            if self.modes is not None:
                assert logits is not None
                self.modes.update(logits.softmax(dim=2))
        if self.patches is not None:
            self.patches.update(indices, images)
        pairs = int((indices < PAIRED).sum()) // 2
        if self.similarity is not None and pairs:
            self.similarity.update(images[: 2 * pairs])
        self.count += len(indices)

    def _parts(self) -> dict[str, object]:
        names = ("moments", "rows", "similarity", "patches", "score", "modes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def state(self) -> dict[str, Tensor]:
        """All sums as tensors by name."""
        found = {"count": torch.tensor(self.count)}
        for name, part in self._parts().items():
            found |= {f"{name}.{key}": value for key, value in part.state().items()}  # type: ignore[attr-defined]
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace all sums by stored ones."""
        self.count = int(state["count"])
        for name, part in self._parts().items():
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            if isinstance(part, FeatureRows | Patches):
                part.load_state(own)
            else:
                setattr(self, name, type(part).from_state(own))  # type: ignore[attr-defined]

    def merge(self, other: Collected) -> None:
        """Add what another rank has seen."""
        if other.score is not None and self.score is not None and not self.score.probability.shape[1]:
            self.score = ClassScore(other.score.probability.shape[1])
        for name, part in self._parts().items():
            theirs = getattr(other, name)
            if not (isinstance(theirs, ClassScore) and not theirs.probability.shape[1]):
                part.merge(theirs)  # type: ignore[attr-defined]
        self.count += other.count


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    write_atomic(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file that `write_tensors` wrote; None if there is none, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _of_rank(partial: Path) -> Path:
    rank, size = ranks.rank_and_size()
    return partial.with_name(f"{partial.name}.rank{rank}of{size}")


def discard(partial: Path | None) -> None:
    """Remove what `stream` stored on this rank."""
    if partial is not None:
        _of_rank(partial).unlink(missing_ok=True)


def stream(
    new: Callable[[], Collected],
    images: Callable[[Tensor], Tensor],
    total: int,
    *,
    batch: int,
    partial: Path | None,
    progress: Callable[[int], None],
) -> Collected | None:
    """Pass images 0 to `total` - 1 by, on each rank its own batches, and join what all saw on the first. A collective.

    Args:
        new: makes empty sums.
        images: the images of indices int64 [n], uint8 [n, C, R, R].
        batch: images of a batch, even; the same batches are made however often a stream is interrupted.
        partial: file to which the sums go now and then, and from which an interrupted stream goes on; each rank
            adds an ending of its own. It stays until `discard`. None: nothing is stored.
        progress: called with the number of images that were done, over all ranks as far as this one knows.

    Returns:
        The sums on the first rank, None on the others.
    """
    rank, size = ranks.rank_and_size()
    collected, done = new(), rank
    if partial is not None:
        partial = _of_rank(partial)
        stored = read_tensors(partial)
        if stored is not None:
            done = int(stored.pop("done"))
            collected.load_state(stored)
    batches = -(-total // batch)
    saved, wait = time.monotonic(), _SAVE_SECONDS

    def save(position: int, partial: Path) -> None:
        nonlocal saved, wait
        began = time.monotonic()
        with contextlib.suppress(OSError):  # on a full disk an interrupt costs more, but the numbers are still had
            write_tensors({"done": torch.tensor(position), **collected.state()}, partial)
        saved = time.monotonic()
        wait = max(_SAVE_SECONDS, 20 * (saved - began))  # writing takes a twentieth of the time at most

    progress(min(total, (done - rank) * batch))
    for i in range(done, batches, size):
        indices = torch.arange(i * batch, min((i + 1) * batch, total))
        collected.update(indices, images(indices))
        progress(len(indices) if size == 1 else min(total - i * batch, size * batch))
        if partial is not None and time.monotonic() - saved > wait:
            save(i + size, partial)
    if partial is not None and partial.exists():
        save(max(done, batches + rank), partial)  # what follows may be interrupted too
    states = ranks.gather(collected.state())
    if states is None:
        return None
    whole = new()
    for state in states:
        other = new()
        other.load_state(state)
        whole.merge(other)
    return whole
