"""How long a run still takes, counted over its stages: a later one is slower than the present one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastgan.config.growth import Stage

# What was observed loses half its weight after this share of the run's time. What was measured before the run has the
# weight of such a share: the smallest stages, where the log weighs as much as the steps, say little of the others.
_SHARE = 0.03
# Where nothing was measured: a step of twice the resolution takes about three times as long.
_GROWTH = 3.0


class TimeLeft:
    """Seconds left: what the cost model expects of the rest, by how much slower the run was than that so far.

    Args:
        stages: of the run.
        costs: seconds for each image at each resolution, as measured before the run; their ratios matter alone. A
            resolution that is missing is taken from the nearest.
    """

    def __init__(self, stages: Sequence[Stage], costs: Mapping[int, float] | None = None) -> None:
        self._stages = stages
        self._costs = {stage.resolution: _cost(stage.resolution, costs or {}) for stage in stages}
        self._total = self.expected(0, stages[-1].end)
        self._seconds = self._expected = _SHARE * self._total if costs else 0.0
        self._images, self._besides = 0, 0.0

    def expected(self, start: int, end: int) -> float:
        """What the cost model expects of the images from `start` to `end`."""
        total = 0.0
        for stage in self._stages:
            images = min(end, stage.end) - max(start, stage.start)
            total += max(images, 0) * self._costs[stage.resolution]
        return total

    def observe(self, start: int, end: int, seconds: float, besides: float = 0.0) -> None:
        """Take in that the images from `start` to `end` took so many seconds, `besides` those of files and samples."""
        expected = self.expected(start, end)
        kept = 0.5 ** (expected / (_SHARE * self._total))
        self._seconds = kept * self._seconds + seconds
        self._expected = kept * self._expected + expected
        self._images += end - start
        self._besides += besides

    def seconds(self, images: int) -> float:
        """Seconds from `images` to the end of the run; 0 before anything was observed."""
        if self._images <= 0:
            return 0.0
        end = self._stages[-1].end
        besides = self._besides / self._images * max(end - images, 0)
        return self._seconds / self._expected * self.expected(images, end) + besides


def _cost(resolution: int, costs: Mapping[int, float]) -> float:
    if resolution in costs:
        return costs[resolution]
    nearest = min(costs, key=lambda r: abs(r.bit_length() - resolution.bit_length()), default=resolution)
    known: float = costs.get(nearest, 1.0) if nearest != resolution else 1.0
    levels = resolution.bit_length() - (nearest if costs else 4).bit_length()
    return known * _GROWTH**levels
