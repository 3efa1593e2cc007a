"""What a run does again after so many images: log, sample, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastgan.config import Config


@dataclass(frozen=True)
class Interval:
    """Something that is done every `kimg` thousand images, and at the end of the run."""

    kimg: float
    action: Callable[[], object]

    def due(self, before: int, images: int, total: int) -> bool:
        """Whether the step that took the images seen from `before` to `images` of `total` reached a multiple."""
        every = 1000 * self.kimg
        return images >= total or int(images / every) > int(before / every)


def checkpoint_kimg(config: Config) -> float:
    """Thousands of images between checkpoints."""
    return config.run.checkpoint_kimg or min(config.schedule.kimg / 20, 200.0)


def sample_kimg(config: Config) -> float:
    """Thousands of images between sample grids."""
    return config.run.sample_kimg or checkpoint_kimg(config)


def log_kimg(config: Config) -> float:
    """Thousands of images between rows of metrics.jsonl."""
    return config.run.log_kimg or min(config.schedule.kimg / 100, 4.0)
