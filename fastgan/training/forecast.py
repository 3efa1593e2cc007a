"""A run on a cluster before it runs: each stage's time, memory and communication, from step times and a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastgan.config import Config, active_ranks, batch_at
from fastgan.config.stages import Stage
from fastgan.data import Source
from fastgan.planning.communication import Cluster, NetworkTime, StageTime, stage_seconds, step_seconds
from fastgan.training.distributed.deepspeed_engine import uses_own_reducer
from fastgan.training.dry_run import Footprint, footprint
from fastgan.training.factory import engine_settings, plan
from fastgan.training.step_measurement import Bench, StepTimes, Timing, free_bytes

# Beyond what a step keeps: workspaces of convolutions, the allocator's gaps, the images.
_MEMORY_HEADROOM = 1.3
# A single step may take this many times the time of a measurement: small steps are slower than their operations say, so
# that those after them are expected to be slower than they are. Three steps are run at least.
_PATIENCE = 6


@dataclass(frozen=True)
class Share:
    """What a rank that works does in a stage."""

    stage: Stage
    batch: int
    active: int
    micro: int

    def parts(self) -> list[tuple[bool, int]]:
        """(whether it fades, images) of what the stage consists of."""
        s = self.stage
        fading = max(min(s.fade_end, s.end) - s.start, 0)
        return [(fades, n) for fades, n in ((True, fading), (False, s.end - s.start - fading)) if n > 0]


def shares(config: Config, world: int) -> list[Share]:
    """Every stage of a run on `world` ranks; `check_stages` has passed."""
    s = config.schedule
    found = []
    for stage in plan(config):
        batch = batch_at(s, stage.resolution)
        working = active_ranks(batch, world, s.accumulation) or world
        found.append(Share(stage, batch, working, batch // (working * s.accumulation)))
    return found


@dataclass(frozen=True)
class Row:
    """A stage of the plan. note: how its step times came about, where they were not measured as they are used."""

    share: Share
    of: Footprint
    time: StageTime
    note: str

    @property
    def images(self) -> int:
        return self.share.stage.end - self.share.stage.start


class Planner:
    """Footprints are counted once for each step they are asked for."""

    def __init__(self, config: Config, source: Source, cluster: Cluster) -> None:
        self.config, self.source, self.cluster = config, source, cluster
        self._footprints: dict[tuple[int, int, bool], Footprint] = {}

    def footprint(self, stage: Stage, micro: int, fading: bool) -> Footprint:
        key = (stage.resolution, micro, fading)
        if key not in self._footprints:
            self._footprints[key] = footprint(self.config, self.source, stage, micro, self.cluster.size, fading=fading)
        return self._footprints[key]

    def wanted(self, more: bool) -> list[tuple[Share, int, bool]]:
        """(share, micro-batch, fading) of every step that should be measured, the cheap ones first.

        `more` adds a quarter of each micro-batch, a sixteenth and so on, for plans with other numbers of ranks.
        """
        steps = []
        for share in shares(self.config, self.cluster.size):
            micros = [share.micro]
            while more and micros[-1] > 1:
                micros.append(max(micros[-1] // 4, 1))
            steps += [(share, micro, fading) for micro in micros[::-1] for fading, _ in share.parts()]
        return steps

    def measure(self, variant: str, device: torch.device, seconds: float, *, more: bool) -> Iterator[Timing | str]:
        """Measure `wanted` steps one by one; a line of text for each that was left out, as too large or too slow."""
        bench = Bench(self.config, variant, device, self.source.channels, seconds)
        done: list[Timing] = []
        for share, micro, fading in self.wanted(more):
            of = self.footprint(share.stage, micro, fading)
            name = f"{share.stage.resolution} px, {micro} per rank"
            if of.bytes * _MEMORY_HEADROOM > free_bytes(device):
                yield f"{name}: not measured, it needs {of.bytes / 2**30:.1f} GiB"
                continue
            if len(done) > 1:
                expected = self._by_operations(done, share.stage.resolution, micro, fading, of)
                takes = expected.d.seconds + expected.g.seconds
                if takes > _PATIENCE * seconds:
                    yield f"{name}: not measured, a step would take about {takes:.0f} s"
                    continue
            try:
                done.append(bench.time(share.stage.resolution, micro, fading))
            except torch.OutOfMemoryError:
                yield f"{name}: not measured, it ran out of memory"
                continue
            yield done[-1]

    def rows(self, times: StepTimes) -> list[Row]:
        """The plan.

        Raises:
            LookupError: no step of the run, nor of a lower stage, was measured.
        """
        rows = []
        for share in shares(self.config, self.cluster.size):
            time, note = self.time(times, share)
            of = max((self.footprint(share.stage, share.micro, f) for f, _ in share.parts()), key=lambda f: f.bytes)
            rows.append(Row(share, of, time, note))
        return rows

    def _own_reduction(self, share: Share) -> bool:
        return uses_own_reducer(engine_settings(self.config, share.stage.resolution, self.cluster.size))

    def reducing(self, share: Share) -> Cluster:
        """The ranks that average gradients: those at work, where the trainer gives them a group of their own."""
        return self.cluster.first(share.active) if self._own_reduction(share) else self.cluster

    def time(self, times: StepTimes, share: Share) -> tuple[StageTime, str]:
        """A stage's time, and how it came about if not by measuring.

        Raises:
            LookupError: as for `rows`.
        """
        notes: dict[str, None] = {}
        parts = []
        for fading, images in share.parts():
            timing, note = self._timing(times, share, fading)
            notes |= {note: None} if note else {}
            step = step_seconds(
                timing.d,
                timing.g,
                self.reducing(share),
                n_critic=self.config.optimizer.n_critic,
                accumulation=self.config.schedule.accumulation,
                deferred=self._own_reduction(share),
            )
            parts.append((float(images), step))
        return stage_seconds(parts, share.batch, self.config.optimizer.n_critic), "; ".join(notes)

    def _timing(self, times: StepTimes, share: Share, fading: bool) -> tuple[Timing, str]:
        """Measured, or from other micro-batches of the stage, or from the stages nearest to it."""
        known = times.at(share.stage.resolution, share.micro, fading)
        if known is not None:
            return known
        stages = {s.stage.resolution for s in shares(self.config, self.cluster.size)}
        usable = [t for t in times.timings if t.resolution in stages]
        if not usable:
            raise LookupError(share.stage.resolution)
        of = self.footprint(share.stage, share.micro, fading)
        timing = self._by_operations(usable, share.stage.resolution, share.micro, fading, of)
        return timing, "by operations and parameters from steps of other stages"

    def _by_operations(
        self, measured: list[Timing], resolution: int, micro: int, fading: bool, of: Footprint
    ) -> Timing:
        """A step that was not measured: so long for each parameter, so long for each operation, as those nearest to it.

        Small steps are all reading and updating of weights, large ones all products.
        """
        stages = {s.stage.resolution: s.stage for s in shares(self.config, self.cluster.size)}
        sizes = sorted({t.resolution for t in measured}, key=lambda r: abs(math.log2(r / resolution)))[:3]
        near = [t for t in measured if t.resolution in sizes]
        known = [(t, self.footprint(stages[t.resolution], t.micro, t.fading)) for t in near]
        d = _fit([(f.trained_d, f.flops_d, t.d.seconds) for t, f in known])
        g = _fit([(f.trained_g, f.flops_g, t.g.seconds) for t, f in known])
        like = max((t for t in near if t.resolution == sizes[0]), key=lambda t: (t.fading == fading, t.micro))
        return Timing(
            resolution,
            micro,
            fading,
            _stretched(like.d, d[0] * of.trained_d + d[1] * of.flops_d, of.trained_d * 4),
            _stretched(like.g, g[0] * of.trained_g + g[1] * of.flops_g, of.trained_g * 4),
        )


def _fit(points: list[tuple[int, int, float]]) -> tuple[float, float]:
    """(a, b), both 0 or more, for which a parameters + b operations are nearest to the seconds, relative to them."""
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


def _stretched(part: NetworkTime, seconds: float, nbytes: int) -> NetworkTime:
    """Another network's step of `seconds`; its gradients become ready in the same rhythm."""
    held, scaled = sum(size for size, _ in part.gradients), part.scaled(seconds / part.seconds)
    return replace(scaled, gradients=tuple((round(n * nbytes / held), before) for n, before in scaled.gradients))
