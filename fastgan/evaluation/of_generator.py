"""Evaluation of a trained generator: its images by index, and `evaluate` for Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgan.data import Source, open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation, choose_metrics, default_extractor, default_images, needs_features
from fastgan.generator import TrainedGenerator, device_of, generate
from fastgan.utils import counter_rng
from fastgan.utils.system import cache_folder


def drawer(generator: nn.Module, networks: dict[str, Any], source: Source, seed: int) -> Callable[[Tensor], Tensor]:
    """A function from indices, int64 [n], to images, uint8 [n, C, R, R] on the CPU; image i depends on (seed, i) alone.

    Latents are those of `fastgan sample`. A conditional generator gets labels with the frequencies of the real images,
    or all labels in turn where the real images have none.

    Args:
        networks: the generator's arguments of `fastgan.models.build`.
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


def evaluate(
    trained: TrainedGenerator,
    data: str,
    *,
    n: int | None = None,
    real: int | None = None,
    metrics: Sequence[str] | None = None,
    features: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Compare a generator's images with real ones, as `fastgan evaluate` does; see `fastgan.evaluation.evaluate`."""
    networks = trained.meta["networks"]
    device = device_of(trained.module)
    source = open_source(data, networks["resolution"], networks["channels"])
    extractor = None
    if needs_features(metrics):
        extractor = open_extractor(features or default_extractor(source), source.channels, device)
    chosen = choose_metrics(metrics, extractor, source, networks["resolution"])
    default_n, default_real = default_images(extractor, device)
    evaluation = Evaluation(
        chosen, extractor, n or default_n, seed, cache_folder("evaluation"), real=real or default_real
    )

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    found = evaluation(drawer(trained.module, networks, source, seed), source, networks["resolution"], warn)
    assert found is not None  # one process
    values: dict[str, float] = found["metrics"]
    return values
