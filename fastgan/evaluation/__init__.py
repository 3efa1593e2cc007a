"""How good the images of a generator are: `evaluate` from Python, and what `fastgan evaluate` is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastgan.generator import TrainedGenerator

__all__ = ["evaluate"]


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
    """Compare a generator's images with real ones, in this process, as `fastgan evaluate` does.

        evaluate(fastgan.load("RUN"), "digits", n=5000)["frechet_distance"]

    Args:
        trained: as `fastgan.load` returns it.
        data: the real images, as for `--data`; they are read at the generator's resolution and channels.
        n: number of generated images; None: 50,000, or 5,000 on a CPU with features other than digits.
        real: number of real images; None: all, or 5,000 on a CPU with features other than digits.
        metrics: some of fid, kid, is, prdc, swd, msssim, modes; None: all that apply to the data and the features.
        features: as for `--features`; None: digits for digits, else Inception where its weights are downloaded, else
            efficientnet-lite0.
        seed: of the generated images and of every random choice of a metric.

    Returns:
        Values by name, as in the record of `fastgan evaluate`. Reasons why one is less reliable are printed to stderr.

    Raises:
        ArgumentError: the data or the features cannot be used, or a metric cannot be computed. (It is a ValueError.)
    """
    from fastgan.evaluation.of_generator import evaluate

    return evaluate(trained, data, n=n, real=real, metrics=metrics, features=features, seed=seed)
