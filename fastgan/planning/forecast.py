"""Forecast of a run on a cluster: time, memory and communication of each stage.

Nothing here runs a step. Footprints and step times are passed in by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastgan.config import Config, active_ranks, batch_at
from fastgan.config.growth import Stage
from fastgan.planning.cost_model import Cluster, Cost, UpdateTime, step_cost, total_cost
from fastgan.planning.memory import HEADROOM, Footprint
from fastgan.planning.step_times import StepTimes, Timing
from fastgan.utils.text import readable_duration

# A step is not measured if it is expected to take longer than this many times the time of a measurement. A measurement
# runs three steps or more. Small steps are slower than their operation count suggests, so the estimate is too high.
_MAX_STEP = 6


@dataclass(frozen=True)
class StageBatch:
    """How the batch of a stage is divided.

    Attributes:
        stage: the stage.
        size: images of one discriminator update, over all ranks.
        active: ranks that share the batch.
        micro: images of a micro-batch of one active rank.
    """

    stage: Stage
    size: int
    active: int
    micro: int

    @property
    def images(self) -> int:
        return self.stage.end - self.stage.start

    def parts(self) -> list[tuple[bool, int]]:
        """(fading, images) of the parts of the stage: fade-in, then the rest."""
        fading = max(min(self.stage.fade_end, self.stage.end) - self.stage.start, 0)
        return [(fades, n) for fades, n in ((True, fading), (False, self.images - fading)) if n > 0]


def stage_batches(config: Config, stages: Sequence[Stage], ranks: int) -> list[StageBatch]:
    """The batch of each stage of a run whose batches can be divided over `ranks` ranks."""
    schedule = config.schedule
    result = []
    for stage in stages:
        size = batch_at(schedule, stage.resolution)
        active = active_ranks(size, ranks, schedule.accumulation) or ranks
        result.append(StageBatch(stage, size, active, size // (active * schedule.accumulation)))
    return result


@dataclass(frozen=True)
class StageForecast:
    """Forecast of one stage.

    Attributes:
        batch: how the stage's batch is divided.
        footprint: memory and operations of an active rank.
        cost: time of the whole stage.
        note: how the step times were derived; "" if they were measured.
    """

    batch: StageBatch
    footprint: Footprint
    cost: Cost
    note: str


class Forecaster:
    """Forecasts the stages of one run on one cluster.

    Args:
        config: configuration of the run.
        stages: stages of the run.
        cluster: all ranks.
        footprint: (stage, micro-batch, fading) -> footprint of a step on a rank of `cluster`. Called several times
            with the same arguments.
        own_reducer: whether the trainer reduces gradients itself: only between active ranks, and deferred to the next
            use of the weights. DeepSpeed reduces between all ranks, at the end of the backward pass.
    """

    def __init__(
        self,
        config: Config,
        stages: Sequence[Stage],
        cluster: Cluster,
        footprint: Callable[[Stage, int, bool], Footprint],
        *,
        own_reducer: bool,
    ) -> None:
        self.cluster, self.footprint = cluster, footprint
        self.batches = stage_batches(config, stages, cluster.size)
        self._n_critic, self._accumulation = config.optimizer.n_critic, config.schedule.accumulation
        self._own_reducer = own_reducer

    def steps_to_measure(self, smaller: bool) -> list[tuple[Stage, int, bool]]:
        """(stage, micro-batch, fading) of every step of the run, cheap ones first.

        Args:
            smaller: also a quarter of each micro-batch, a sixteenth and so on, for forecasts with more ranks.
        """
        steps = []
        for batch in self.batches:
            sizes = [batch.micro]
            while smaller and sizes[-1] > 1:
                sizes.append(max(sizes[-1] // 4, 1))
            steps += [(batch.stage, micro, fading) for micro in sizes[::-1] for fading, _ in batch.parts()]
        return steps

    def measure(
        self,
        time_step: Callable[[int, int, bool], Timing],
        free_bytes: Callable[[], float],
        seconds: float,
        *,
        smaller: bool,
    ) -> Iterator[Timing | str]:
        """Measure the steps of `steps_to_measure`, except those that are too large or too slow.

        Args:
            time_step: measures the step of (resolution, micro-batch, fading); raises MemoryError if it does not fit.
            free_bytes: free memory of the device.
            seconds: duration of one measurement.
            smaller: as in `steps_to_measure`.

        Yields:
            The timing of each step, or a line that says why it was not measured.
        """
        done: list[Timing] = []
        for stage, micro, fading in self.steps_to_measure(smaller):
            step = f"{stage.resolution} px, {micro} per rank"
            footprint = self.footprint(stage, micro, fading)
            if footprint.bytes * HEADROOM > free_bytes():
                yield f"{step}: not measured, it needs {footprint.bytes / 2**30:.1f} GiB"
                continue
            if len(done) > 1:
                expected = self._estimated(done, stage.resolution, micro, fading, footprint)
                duration = expected.d.seconds + expected.g.seconds
                if duration > _MAX_STEP * seconds:
                    yield f"{step}: not measured, a step would take about {readable_duration(duration)}"
                    continue
            try:
                done.append(time_step(stage.resolution, micro, fading))
            except MemoryError:
                yield f"{step}: not measured, it ran out of memory"
                continue
            yield done[-1]

    def forecast(self, times: StepTimes) -> list[StageForecast]:
        """Forecast of every stage.

        Raises:
            LookupError: no step of any stage was measured.
        """
        result = []
        for batch in self.batches:
            cost, note = self.cost(times, batch)
            footprints = (self.footprint(batch.stage, batch.micro, fading) for fading, _ in batch.parts())
            result.append(StageForecast(batch, max(footprints, key=lambda f: f.bytes), cost, note))
        return result

    def cost(self, times: StepTimes, batch: StageBatch) -> tuple[Cost, str]:
        """Cost of a stage, and how its step times were derived ("" if measured).

        Raises:
            LookupError: no step of any stage was measured.
        """
        notes: dict[str, None] = {}
        parts = []
        for fading, images in batch.parts():
            timing, note = self._timing(times, batch, fading)
            notes |= {note: None} if note else {}
            step = step_cost(
                timing.d,
                timing.g,
                self.cluster.first(batch.active) if self._own_reducer else self.cluster,
                n_critic=self._n_critic,
                accumulation=self._accumulation,
                deferred=self._own_reducer,
            )
            parts.append((images / (batch.size * self._n_critic), step))
        return total_cost(parts), "; ".join(notes)

    def _timing(self, times: StepTimes, batch: StageBatch, fading: bool) -> tuple[Timing, str]:
        """Measured, else from other micro-batches of the stage, else estimated from the nearest stages."""
        resolution = batch.stage.resolution
        known = times.at(resolution, batch.micro, fading)
        if known is not None:
            return known
        usable = [t for t in times.timings if t.resolution in {b.stage.resolution for b in self.batches}]
        if not usable:
            raise LookupError(resolution)
        footprint = self.footprint(batch.stage, batch.micro, fading)
        timing = self._estimated(usable, resolution, batch.micro, fading, footprint)
        return timing, "estimated from operation and parameter counts of other stages"

    def _estimated(
        self, measured: list[Timing], resolution: int, micro: int, fading: bool, footprint: Footprint
    ) -> Timing:
        """Time of a step that was not measured: linear in parameters and operations, fitted to the nearest stages.

        Small steps spend their time on reading and updating weights, large ones on products.
        """
        stages = {batch.stage.resolution: batch.stage for batch in self.batches}
        nearest = sorted({t.resolution for t in measured}, key=lambda r: abs(math.log2(r / resolution)))[:3]
        near = [t for t in measured if t.resolution in nearest]
        known = [(t, self.footprint(stages[t.resolution], t.micro, t.fading)) for t in near]
        d = _fit([(f.trained_d, f.flops_d, t.d.seconds) for t, f in known])
        g = _fit([(f.trained_g, f.flops_g, t.g.seconds) for t, f in known])
        similar = max((t for t in near if t.resolution == nearest[0]), key=lambda t: (t.fading == fading, t.micro))
        return Timing(
            resolution,
            micro,
            fading,
            _resized(similar.d, d[0] * footprint.trained_d + d[1] * footprint.flops_d, footprint.trained_d * 4),
            _resized(similar.g, g[0] * footprint.trained_g + g[1] * footprint.flops_g, footprint.trained_g * 4),
        )


def _fit(points: list[tuple[int, int, float]]) -> tuple[float, float]:
    """(a, b), both at least 0, that minimize the relative error of seconds = a parameters + b operations."""
    rows = [(p / s, f / s) for p, f, s in points]
    pp, pf, ff = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    p1, f1 = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = pp * ff - pf * pf
    if determinant > 1e-9 * pp * ff:
        a, b = (ff * p1 - pf * f1) / determinant, (pp * f1 - pf * p1) / determinant
        if min(a, b) >= 0:
            return a, b
        if b < 0:
            return p1 / pp, 0.0
    return 0.0, f1 / ff


def _resized(update: UpdateTime, seconds: float, nbytes: int) -> UpdateTime:
    """An update of `seconds` with `nbytes` of gradients, which become ready in the rhythm of `update`."""
    old, scaled = sum(size for size, _ in update.gradients), update.scaled(seconds / update.seconds)
    return replace(scaled, gradients=tuple((round(n * nbytes / old), before) for n, before in scaled.gradients))
