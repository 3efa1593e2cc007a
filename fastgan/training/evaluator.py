"""Evaluation while a run trains, and the record of what was measured."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgan import __version__
from fastgan.config import Config
from fastgan.data import Source
from fastgan.errors import ArgumentError
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation, choose_metrics, default_extractor, default_images
from fastgan.evaluation.of_generator import drawer
from fastgan.utils.files import write_atomic
from fastgan.utils.system import cache_folder

RECORD = "evaluation.jsonl"


def record(
    evaluation: Evaluation, found: dict[str, Any], meta: dict[str, Any], source: Source, warnings: list[str]
) -> dict[str, Any]:
    """One line of a run's evaluation.jsonl: the metrics, and everything they depend on."""
    extractor = evaluation.extractor
    return {
        "kimg": meta.get("images", 0) / 1000,  # an exported file may not say
        "variant": meta.get("variant"),
        **found,
        # All three are None where only pixels were compared.
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
    """Why nothing can be written into a run's folder, or "". It is tried, as file modes say nothing about mounts."""
    try:
        with tempfile.TemporaryFile(dir=run):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def append(run: Path, line: dict[str, Any]) -> Path:
    """Append a line to a run's record; the file is replaced whole."""
    path = run / RECORD
    before = path.read_bytes() if path.is_file() else b""  # bytes, as a line may be damaged
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_atomic(path, before + json.dumps(line).encode() + b"\n")
    return path


class Evaluator:
    """Evaluates the averaged generator of a run while it trains.

    Args:
        source: the real images.
        n: how many images are generated.
        features: as in `--features`; None: the default for the source.
        seed: of latents, labels and subsets.
        device: where features are computed.

    Raises:
        ArgumentError: the features are not available, or there are too few images for the metrics.
    """

    def __init__(self, source: Source, n: int, features: str | None, seed: int, device: torch.device) -> None:
        # torch-fidelity's seeds have 32 bits. The recorded seed gives the same numbers in `fastgan evaluate --seed`.
        self.source, self.n, self.seed = source, n, seed % 2**32
        try:
            self.extractor = open_extractor(features or default_extractor(source), source.channels, device)
        except ArgumentError as error:
            if error.argument == "--features":
                raise error.renamed("--evaluate-features") from None
            raise
        self.real = default_images(self.extractor, device)[1]
        try:
            # The last resolution has all metrics of the lower ones.
            self._evaluation(source.resolution).require_enough_images(source)
        except ArgumentError as error:
            raise error.renamed("--evaluate-n" if error.argument == "--n" else error.argument) from None

    @classmethod
    def of(cls, config: Config, source: Source, device: torch.device) -> Evaluator:
        """The evaluator that a run's configuration asks for."""
        run = config.run
        return cls(source, run.evaluate_n, run.evaluate_features, run.seed, device)

    def _evaluation(self, resolution: int) -> Evaluation:
        # Patches of real images are not cached, and cutting and sorting them takes longer than all the rest.
        metrics = [name for name in choose_metrics(None, self.extractor, self.source, resolution) if name != "swd"]
        cache = cache_folder("evaluation")
        return Evaluation(metrics, self.extractor, self.n, self.seed, cache=cache, real=self.real)

    def __call__(self, generator: nn.Module, meta: dict[str, Any]) -> dict[str, Any] | None:
        """Evaluate; a collective.

        Args:
            generator: the moving average.
            meta: variant, networks and images seen, as in a checkpoint.

        Returns:
            A line for the run's record on the first rank, None on the others.
        """
        resolution = meta["networks"]["resolution"]
        evaluation = self._evaluation(resolution)
        warnings: list[str] = []
        draw = drawer(generator, meta["networks"], self.source, self.seed)
        found = evaluation(draw, self.source, resolution, warnings.append)
        return None if found is None else record(evaluation, found, meta, self.source, warnings)
