"""What evaluation needs to know of a run: its images by index, its record, its place in the logs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgan import __version__
from fastgan.data import Source
from fastgan.errors import ArgumentError
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation, choose_metrics, default_extractor
from fastgan.generator import device_of, generate
from fastgan.utils import counter_rng
from fastgan.utils.files import write_atomic
from fastgan.utils.system import cache_folder

RECORD = "evaluation.jsonl"


def drawer(generator: nn.Module, networks: dict[str, Any], source: Source, seed: int) -> Callable[[Tensor], Tensor]:
    """The images of indices int64 [n], uint8 [n, C, R, R] on the CPU; image i depends on (seed, i) alone.

    Latents are those of `fastgan sample`. With classes, labels are drawn as often as the real images have them; of
    images without labels, they go round.
    """
    device = device_of(generator)

    def draw(indices: Tensor) -> Tensor:
        indices = indices.to(device)
        latent = counter_rng.normal(seed, "sample", indices, networks["latent"])
        labels = None
        if networks["num_classes"] and source.labels is not None:
            of = counter_rng.integers(seed, "real image whose label is evaluated", indices, len(source))
            labels = torch.from_numpy(np.asarray(source.labels)).to(device)[of]
        elif networks["num_classes"]:
            labels = indices % networks["num_classes"]
        images = generate(generator, latent, labels, networks["resolution"])
        return ((images + 1) * 127.5).round().to(torch.uint8)

    return draw


def record(
    evaluation: Evaluation, found: dict[str, Any], meta: dict[str, Any], source: Source, warnings: list[str]
) -> dict[str, Any]:
    """One line of a run's evaluation.jsonl: the numbers, and everything they depend on."""
    extractor = evaluation.extractor
    return {
        "kimg": meta["images"] / 1000,
        "variant": meta["variant"],
        **found,
        # None, of all three, where only pixels were compared.
        "features": getattr(extractor, "name", None),
        "feature_weights": getattr(extractor, "fingerprint", None),
        "resize": getattr(extractor, "resize", None),
        "resolution": meta["networks"]["resolution"],
        "data": source.name,
        "fingerprint": source.fingerprint,
        "seed": evaluation.seed,
        "warnings": warnings,
        "version": __version__,
    }


def unwritable(run: Path) -> str:
    """Why nothing can be written into a run's folder, or "": seen by trying, as a mode does not tell of a mount."""
    try:
        with tempfile.TemporaryFile(dir=run):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def append(run: Path, line: dict[str, Any]) -> Path:
    """Add a line to a run's record, which is never left with half of one."""
    path = run / RECORD
    before = path.read_bytes() if path.is_file() else b""  # not as text: a line may be damaged
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_atomic(path, before + json.dumps(line).encode() + b"\n")
    return path


class Evaluator:
    """Evaluates the averaged generator of a run that is under way.

    Args:
        source: the real images; n: generated ones; features: as in `--features`; seed: of all randomness.

    Raises:
        ArgumentError: the features cannot be had, or there are too few images for what will be computed.
    """

    def __init__(self, source: Source, n: int, features: str | None, seed: int, device: torch.device) -> None:
        # As far as torch-fidelity's go; what is recorded is what `fastgan evaluate --seed` takes for the same numbers.
        self.source, self.n, self.seed = source, n, seed % 2**32
        try:
            self.extractor = open_extractor(features or default_extractor(source), source.channels, device)
        except ArgumentError as error:
            if error.argument == "--features":
                raise error.renamed("--evaluate-features") from None
            raise
        try:
            # The last resolution has all metrics of the lower ones.
            self._evaluation(source.resolution).require_enough_images(source)
        except ArgumentError as error:
            raise error.renamed("--evaluate-n" if error.argument == "--n" else error.argument) from None

    def _evaluation(self, resolution: int) -> Evaluation:
        # Patches of real images are not cached, and cutting and sorting them takes longer than all the rest.
        metrics = [name for name in choose_metrics(None, self.extractor, self.source, resolution) if name != "swd"]
        return Evaluation(metrics, self.extractor, self.n, self.seed, cache=cache_folder("evaluation"))

    def __call__(self, generator: nn.Module, meta: dict[str, Any]) -> dict[str, Any] | None:
        """A collective: a line of the run's record on the first rank, None on others.

        meta: variant, networks and images seen, as in a checkpoint.
        """
        resolution = meta["networks"]["resolution"]
        evaluation = self._evaluation(resolution)
        warnings: list[str] = []
        draw = drawer(generator, meta["networks"], self.source, self.seed)
        found = evaluation(draw, self.source, resolution, warnings.append)
        return None if found is None else record(evaluation, found, meta, self.source, warnings)
