"""The training loop: stages, steps, checkpoints, logs."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgan.checkpoint import Checkpoint
from fastgan.config import Config, batch_at, validate
from fastgan.config.growth import stage_at, stages_of
from fastgan.data import Source
from fastgan.generator import sample_images
from fastgan.ops import qualification
from fastgan.ops.qualification import wording
from fastgan.planning.time_left import TimeLeft
from fastgan.training import precision, torch_settings
from fastgan.training.best import BestCheckpoint
from fastgan.training.checkpoints import state as checkpoint_state
from fastgan.training.compiling.capturing import Capturing
from fastgan.training.compiling.compilation import Compilation
from fastgan.training.distributed.process_group import ProcessGroup, broadcast_tensors
from fastgan.training.evaluator import Evaluator, append
from fastgan.training.feed import Feed
from fastgan.training.from_config import network_values, penalty_is_due, rates
from fastgan.training.intervals import Interval, checkpoint_kimg, log_kimg, sample_kimg
from fastgan.training.loss_scale import LossScales
from fastgan.training.observability.clock import TrainingClock
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.metrics_log import MetricsLog
from fastgan.training.observability.rank_log import LOGGER, rank_log
from fastgan.training.observability.runaway import RunawayDetector, respond
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.resilience.signals import SignalHandler
from fastgan.training.stage import ActiveStage, State


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the message names the step, the tensor and the last good checkpoint."""


class Trainer:
    """A run, from its configuration to its last checkpoint.

    Args:
        config: what to train, and how.
        variant: name, for the record.
        world: this process among the others.
        source: the images.
        run: the run directory; it exists and holds config.yaml.
        resume: checkpoint to resume from.
        initial: weights that a new run starts from, of the networks of the first stage.
        costs: see `TimeLeft`.

    Attributes:
        config: that of the run, with a precision in place of "auto".
        precision_note: line for the log: the precision, and why.
        images: real images seen so far, the clock of a run.
        steps: generator steps so far.
        stage: networks, engines and the step at the current resolution.
    """

    def __init__(
        self,
        config: Config,
        variant: str,
        world: ProcessGroup,
        source: Source,
        run: Path,
        resume: Checkpoint | None = None,
        initial: State | None = None,
        costs: Mapping[int, float] | None = None,
    ) -> None:
        validate(config)
        config, self.precision_note = precision.resolve(config, variant, world)
        torch_settings.allow_tf32(config.system.precision == "tf32")
        self.config, self.variant, self.world, self.source, self.run_path = config, variant, world, source, run
        # A step draws nothing from torch's own generator, but a network of the user's may.
        torch.manual_seed(config.run.seed)
        self.stages = stages_of(config)
        self.time_left = TimeLeft(self.stages, costs)
        self.total = round(config.schedule.kimg * 1000)
        self.images = self.steps = 0
        self.meters = Meters()
        self.scales = LossScales(world.device) if config.system.precision == "fp16" else None
        self.feed = Feed(config, world, source, self.stages[0].resolution)
        self.stragglers = StragglerDetector(world)
        self.runaway = RunawayDetector()
        self.last_good: Path | None = None
        self.clock = TrainingClock()
        self._groups: dict[int, Any] = {}
        of_images = {"channels": source.channels, "num_classes": source.num_classes}
        self.compilation = Compilation(config, world, self.stages, **of_images)
        self.capturing = Capturing(config)
        # Opened before the first step, so that missing features are reported at once.
        self._evaluator = None if config.run.evaluate_kimg is None else Evaluator.of(config, source, world.device)
        # The ops run what they ran before the stop, so that a run that is resumed computes the same bits.
        self._note = qualification.adopt(None if resume is None else resume.meta.get("implementations"), world.device)
        self.best = BestCheckpoint(config.run.keep_best)
        self.stage: ActiveStage
        if resume is None:
            self.enter(self.stages[0].resolution, initial)
        else:
            values = network_values(config.networks, resolution=resume.meta["resolution"], **of_images)
            checkpoint_state.restore(self, resume, values)

    def enter(self, resolution: int, state: State | None = None, ema_steps: int = 0, grown: bool = False) -> None:
        """Build the networks of a resolution and train them from now on; arguments as for `ActiveStage`."""
        self.stage = ActiveStage(
            self.config,
            self.world,
            resolution,
            channels=self.source.channels,
            num_classes=self.source.num_classes,
            stragglers=self.stragglers,
            meters=self.meters,
            scales=self.scales,
            groups=self._groups,
            state=state,
            ema_steps=ema_steps,
            grown=grown,
        )
        LOGGER.info("%d px from %g kimg", resolution, self.images / 1000)
        self.feed.pipeline.set_resolution(resolution)

    def grow(self) -> None:
        """Networks of twice the resolution, with the weights of these; optimizers start anew (Karras et al. 2018)."""
        self.stage.synchronize()
        state, ema_steps = self.stage.state(), int(self.stage.ema.steps.item())
        self.raise_if_nonfinite()
        self.stage.close()
        self.enter(2 * self.stage.resolution, state, ema_steps, grown=True)

    def train_step(self) -> None:
        """`n_critic` discriminator steps and one generator step, at the stage that the images seen call for."""
        planned = stage_at(self.stages, self.images)
        while self.stage.resolution < planned.resolution:
            self.grow()
        self.stage.set_alpha(planned.alpha(self.images))  # of spectators too: they draw images for an evaluation
        self.clock.exclude(self.compilation.follow(self.stage, self.images))
        batch, n_critic = batch_at(self.config.schedule, self.stage.resolution), self.config.optimizer.n_critic
        if self.stage.share.is_spectator:
            self.images += n_critic * batch
            self.steps += 1
            return
        captures = self.capturing.follow(self.stage)
        with self.stragglers.step():
            rate_g, rate_d = rates(self.config, self.images, self.stage.resolution)
            self.stage.discriminator_engine.set_rate(rate_d)
            self.stage.nonfinite.begin_step(self.steps)
            if captures:
                self.stage.generator_engine.set_rate(rate_g)
                self.images = self.capturing.step(self.stage, self.feed, self.images)
            else:
                for i in range(n_critic):
                    micro_batches = self.feed.micro_batches(self.images, batch, self.stage.share)
                    penalize = penalty_is_due(self.config, self.images, batch)
                    positions = self.stage.discriminator_step(micro_batches, generator_first=i > 0, penalize=penalize)
                    self.images += batch
                self.stage.generator_engine.set_rate(rate_g)
                self.stage.generator_step(positions)
            self.stage.adapt_augmentation(self.images - n_critic * batch, self.images)
            self.steps += 1

    def raise_if_nonfinite(self) -> None:
        """Raise NonFiniteError on every rank if a loss or gradient was not finite on any; a collective."""
        nonfinite = self.stage.nonfinite
        bad = nonfinite.first_bad(self.world.minimum(nonfinite.pending().clone()))
        if bad is not None:
            good = f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint yet"
            raise NonFiniteError(f"step {bad[0]}: {bad[1]} was not finite; {good}")

    def save(self) -> Path:
        """Write a checkpoint; a collective.

        Raises:
            NonFiniteError: something was not finite, so nothing after the bad step is ever saved.
            ArgumentError: it could not be written.
        """
        with self.clock.paused():
            self.raise_if_nonfinite()
            self.stage.synchronize()
            self.last_good = checkpoint_state.write(self)
        return self.last_good

    def run(self) -> int | None:
        """Train to the end, or to a signal, which is then returned; a checkpoint is written either way.

        Raises:
            NonFiniteError: a loss or gradient was not finite.
        """
        log = MetricsLog(self.run_path, active=self.world.main, total=self.total, seen=self.images)
        with rank_log(self.run_path, self.world):
            LOGGER.info("starts at %g kimg, %d px, in %s", self.images / 1000, self.stage.resolution, self.run_path)
            try:
                with SignalHandler(self.world, self.config.system.timeout) as signals:
                    stopped = self._loop(log, signals)
            finally:
                log.close()
                self.compilation.close()
                self.feed.pipeline.close()
                self.stage.close()
            how = f"stopped by {signal.Signals(stopped).name}" if stopped else "done"
            LOGGER.info("%s", wording.of_process(self.world.device))
            LOGGER.info("%s at %g kimg", how, self.images / 1000)
            return stopped

    def _loop(self, log: MetricsLog, signals: SignalHandler) -> int | None:
        intervals = [
            Interval(log_kimg(self.config), lambda: self._log(log)),
            Interval(sample_kimg(self.config), lambda: self._sample(log)),
        ]
        if self._evaluator is not None:
            evaluator, kimg = self._evaluator, self.config.run.evaluate_kimg or self.config.schedule.kimg
            intervals.append(Interval(kimg, lambda: self._evaluate(log, evaluator)))
        checkpoint = Interval(checkpoint_kimg(self.config), self.save)
        self.clock.start(self.images)
        for note in (*([self._note] if self._note else []), *self.stage.notes()):
            log.line(note)
        if self.images >= self.total:  # a run that was done is resumed
            self._sample(log)
            self.save()
        while self.images < self.total:
            before, resolution = self.images, self.stage.resolution
            self.train_step()
            log.advance(self.images)
            if self.stage.resolution > resolution:
                for note in (self.feed.pipeline.describe(), *self.stage.notes()):
                    log.line(note)
            for note in (*self.compilation.notes(), *self.capturing.notes(self.images)):
                log.line(note)
            for interval in intervals:
                if interval.due(before, self.images, self.total):
                    interval.action()
            stop = signals.should_stop()
            if stop or self.best.is_due or checkpoint.due(before, self.images, self.total):
                self.best.keep(self, self.save())
            if stop:
                return signals.signal or signal.SIGTERM
        return None

    def _log(self, log: MetricsLog) -> None:
        self.raise_if_nonfinite()
        names = self.stage.step.metrics
        sums, counts = self.world.sum(self.meters.totals(names, self.world.device)).tolist()
        self.meters.clear()
        lap = self.clock.lap(self.images)
        images_per_second = (self.images - lap.start) / lap.seconds
        self.time_left.observe(lap.start, self.images, lap.seconds, lap.excluded)
        planned, share = stage_at(self.stages, self.images), self.stage.share
        # A penalty that is not in every step may be in none of this row.
        values = {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
        speeds = self.stragglers.row(share.active if share.has_subgroup else self.world.size, log.line)
        log.metrics(
            {
                "images": self.images,
                "step": self.steps,
                "resolution": self.stage.resolution,
                "alpha": planned.alpha(self.images) if planned.resolution == self.stage.resolution else 1.0,
                "form": self.capturing.form(self.stage),
                "images_per_second": images_per_second,
                "data_share": self.feed.waited / lap.seconds,  # the share of all time spent waiting for batches
                **values,
                **speeds,
                **({} if self.scales is None else self.scales.row()),
            },
            self.time_left.seconds(self.images),
        )
        self.feed.waited = 0.0
        self.compilation.at_log(self.stage, self.images, images_per_second)
        leap = self.runaway.update(self.images, values)
        if leap is not None:
            respond(leap, self.steps, self.run_path if self.world.main else None, log.line)

    def _sample(self, log: MetricsLog) -> None:
        with self.clock.paused():
            self.stage.wait()
            if self.world.main:
                run = self.config.run
                images = sample_images(self.stage.ema.module, run.samples, run.seed, self.stage.networks)
                path = self.run_path / "samples" / f"kimg-{self.images / 1000:010.3f}.png"
                log.images(images, path, self.images, self.config.schedule.resolution)

    def _evaluate(self, log: MetricsLog, evaluator: Evaluator) -> None:
        """A collective. The time it takes is not counted as training's."""
        with self.clock.paused():
            self.stage.synchronize()
            if self.world.size > 1:
                # All ranks draw, with the batch-norm statistics that are saved.
                broadcast_tensors(self.stage.ema.module.buffers())
            meta = {"variant": self.variant, "networks": self.stage.networks, "images": self.images}
            record = evaluator(self.stage.ema.module, meta)
            if record is not None:
                append(self.run_path, record)
                log.evaluation(self.images, record)
            self.best.consider(self, record)
