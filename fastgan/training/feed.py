"""This rank's part of each global batch."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fastgan import data
from fastgan.config import Config
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.stage import RankShare


class Feed:
    """Cuts global batches into the micro-batches of this rank.

    Attributes:
        waited: seconds between asking for batches and having them, since it was set to 0.
    """

    def __init__(self, config: Config, world: ProcessGroup, source: data.Source, resolution: int) -> None:
        settings = config.data
        self.pipeline = data.open(
            source,
            resolution=resolution,
            seed=config.run.seed,
            device=world.device,
            mirror=settings.mirror,
            pipeline=settings.pipeline,
            workers=settings.workers,
            resident_bytes=None if settings.resident_gb is None else round(settings.resident_gb * 1e9),
        )
        self.waited = 0.0
        self._rank, self._accumulation = world.rank, config.schedule.accumulation

    def micro_batches(self, start: int, size: int, share: RankShare) -> Iterator[data.Batch]:
        """This rank's micro-batches of the global batch of `size` images from position `start` on.

        Micro-batch a of rank r is strided slice a * active + r of active * accumulation slices: the same global batch
        is cut in the same way, whether ranks or accumulation do it. A rank that has no share and does not wait gets
        that of another.
        """
        parts = share.active * self._accumulation
        for a in range(self._accumulation):
            began = time.monotonic()
            batch = self.pipeline.batch(start, size, rank=a * share.active + self._rank % share.active, world=parts)
            self.waited += time.monotonic() - began
            yield batch
