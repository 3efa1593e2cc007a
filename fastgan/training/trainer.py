"""The training loop: stages, steps, moving average, checkpoints, logs."""

from __future__ import annotations

import datetime
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan import __version__, models
from fastgan import data as data_room
from fastgan.checkpoint import Checkpoint
from fastgan.config import Config, active_ranks, batch_at, batches_for_all
from fastgan.config.stages import Stage, stage_at
from fastgan.generator import sample_images
from fastgan.models.pggan import Progressive
from fastgan.training.checkpoints import contents
from fastgan.training.distributed.deepspeed_engine import DeepSpeedEngine, uses_own_reducer
from fastgan.training.distributed.engine import Engine
from fastgan.training.distributed.process_group import ProcessGroup, broadcast_tensors
from fastgan.training.distributed.torch_engine import TorchEngine
from fastgan.training.ema import Ema
from fastgan.training.factory import (
    build_step,
    engine_settings,
    intervals,
    network_values,
    optimizer_factory,
    plan,
    rates,
)
from fastgan.training.growth import inherit
from fastgan.training.observability.metrics_log import Log
from fastgan.training.observability.nonfinite import NonFiniteDetector
from fastgan.training.observability.rank_log import LOGGER, rank_log
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.resilience.signals import SignalHandler
from fastgan.training.step import Meters, frozen

if TYPE_CHECKING:
    from fastgan.training.evaluator import Evaluator


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the message names the step, the tensor and the last good checkpoint."""


class Trainer:
    """A run from its configuration to its last checkpoint.

    Args:
        config: checked by `fastgan.config.check`.
        variant: name, for the record.
        world: this process among the others.
        source: the images.
        run: the run directory; it exists and holds config.yaml.
        resume: checkpoint to go on from.
    """

    def __init__(
        self,
        config: Config,
        variant: str,
        world: ProcessGroup,
        source: data_room.Source,
        run: Path,
        resume: Checkpoint | None = None,
    ) -> None:
        self.config, self.variant, self.world, self.source, self.run_path = config, variant, world, source, run
        # Nothing of a step draws from torch's own generator, but a network of the user's may.
        torch.manual_seed(config.run.seed)
        self.stages = plan(config)
        self.total = round(config.schedule.kimg * 1000)
        self.images = 0
        self.steps = 0
        self.meters = Meters()
        self.pipeline = data_room.open(
            source,
            resolution=self.stages[0].resolution,
            seed=config.run.seed,
            device=world.device,
            mirror=config.data.mirror,
            pipeline=config.data.pipeline,
            workers=config.data.workers,
            resident_bytes=None if config.data.resident_gb is None else round(config.data.resident_gb * 1e9),
        )
        self._waited = 0.0
        self.stragglers = StragglerDetector(world)
        self._logged_at = (time.monotonic(), 0)
        self._last_good: Path | None = None
        self._engines: tuple[Engine, Engine] | None = None
        self._groups: dict[int, Any] = {}
        # Opened before the first step, so that features that cannot be had are told of at once.
        self._evaluator = self._open_evaluator()
        if resume is None:
            self._enter(self.stages[0].resolution)
        else:
            self._restore(resume)

    # --- stages -----------------------------------------------------------------------------------------------------

    def _network_values(self, resolution: int) -> dict[str, Any]:
        return network_values(
            self.config.networks,
            resolution=resolution,
            channels=self.source.channels,
            num_classes=self.source.num_classes,
        )

    def _build(self, resolution: int) -> tuple[nn.Module, nn.Module]:
        """Fresh networks of a stage, the same on every rank: drawn from (seed, resolution), whatever came before."""
        values = self._network_values(resolution)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed * 4096 + resolution)
            generator, discriminator = models.build(**values)
        if self.config.system.sync_bn:
            generator = nn.SyncBatchNorm.convert_sync_batchnorm(generator)
            discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        self.networks = values
        return generator, discriminator

    def _share_out(self, resolution: int) -> None:
        """Which ranks share a batch at `resolution`, and what the others do; a collective, `check_stages` has passed.

        Sets `working`, the number of those that share, the first ones; `apart`, whether they average their gradients
        among themselves; and `idle`, whether this rank then waits for them, with weights that are out of date.
        """
        s, system = self.config.schedule, self.config.system
        self.active = active_ranks(batch_at(s, resolution), self.world.size, s.accumulation) or self.world.size
        self.has_subgroup = self.active < self.world.size and uses_own_reducer(
            engine_settings(self.config, resolution, self.world.size)
        )
        self.is_spectator = self.has_subgroup and self.world.rank >= self.active
        if self.has_subgroup and self.active not in self._groups:
            limit = datetime.timedelta(seconds=system.timeout)
            self._groups[self.active] = dist.new_group(list(range(self.active)), timeout=limit)

    def wait(self) -> None:
        """Weights and their average are those after the last step, which may leave this to be done until they are used;
        a collective, before anything but a step uses them."""
        if self._engines is not None:
            with self.stragglers.continue_step():
                for engine in self._engines:
                    engine.wait()

    def _catch_up(self) -> None:
        """Weights of ranks that wait are those of the first again; a collective, before they are used or saved."""
        self.wait()
        if self.has_subgroup:
            broadcast_tensors([tensor for module in self._modules() for tensor in module.state_dict().values()])
            broadcast_tensors([self.ema.steps])

    @property
    def memory_format(self) -> torch.memory_format:
        # Measured on two CPU cores over the digits presets: channels_last takes 0.8 to 1.0 times contiguous's time.
        contiguous = self.config.system.memory_format == "contiguous"
        return torch.contiguous_format if contiguous else torch.channels_last

    def _enter(
        self,
        resolution: int,
        state: dict[str, dict[str, Tensor]] | None = None,
        ema_steps: int = 0,
        grown: bool = False,
    ) -> None:
        """Build the networks of a stage and start their engines.

        `state` has "generator", "discriminator" and "ema" of the stage itself, or with `grown` of the one below.
        """
        generator, discriminator = self._build(resolution)
        if state is not None:
            for module, name in ((generator, "generator"), (discriminator, "discriminator")):
                if grown:
                    inherit(module, state[name])
                else:
                    module.load_state_dict(state[name])
        generator, discriminator = generator.to(self.world.device), discriminator.to(self.world.device)
        ema = Ema(generator, self.config.optimizer.ema_decay, self.config.optimizer.ema_warmup)
        if state is not None:
            if grown:
                inherit(ema.module, state["ema"])
            else:
                ema.module.load_state_dict(state["ema"])
        ema.steps.fill_(ema_steps)
        self.ema = ema
        self.nonfinite = NonFiniteDetector(self.world.device)
        self.nonfinite.watch("discriminator", discriminator)
        self.nonfinite.watch("generator", generator)
        for name in ("discriminator", "generator"):  # on ranks too that compute none
            self.nonfinite.loss(f"loss of the {name}", torch.zeros((), device=self.world.device))
        self._share_out(resolution)
        self._engines = (self._engine(generator, False, resolution), self._engine(discriminator, True, resolution))
        generator, discriminator = self._engines[0].module, self._engines[1].module
        ema.module.to(memory_format=self._engines[0].memory_format)
        self.step = build_step(self.config, generator, discriminator, self.source.num_classes)
        self.resolution = resolution
        LOGGER.info("%d px from %g kimg", resolution, self.images / 1000)
        self.pipeline.set_resolution(resolution)

    def _engine(self, module: nn.Module, discriminator: bool, resolution: int) -> Engine:
        make = optimizer_factory(self.config, discriminator=discriminator)
        moved = None if discriminator else lambda: self.ema.update(self.step.generator)
        waiting, group = self.stragglers.waiting, self._groups[self.active] if self.has_subgroup else None
        if self.world.engine == "torch":
            accumulation = self.config.schedule.accumulation
            return TorchEngine(module, make, accumulation, self.memory_format, moved, waiting, group)
        overlap = self.world.device.type == "cuda"
        return DeepSpeedEngine(
            module,
            make,
            engine_settings(self.config, resolution, self.world.size, overlap=overlap),
            waiting,
            self.config.system.timeout,
            self.memory_format,
            group,
            moved,
        )

    def _modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.step.generator, self.step.discriminator, self.ema.module

    def _close_engines(self) -> None:
        if self._engines is not None:
            for engine in self._engines:
                engine.close()
            self._engines = None

    def _grow(self, resolution: int) -> None:
        """Networks of the next resolution with the weights of this one; the optimizers start fresh (Karras 2018)."""
        self._catch_up()
        names = ("generator", "discriminator", "ema")
        state = {
            name: {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
            for name, module in zip(names, self._modules(), strict=True)
        }
        self.raise_if_nonfinite()
        self._close_engines()
        self._enter(resolution, state, int(self.ema.steps.item()), grown=True)

    def _set_alpha(self, stage: Stage) -> None:
        alpha = stage.alpha(self.images)
        for module in self._modules():
            if isinstance(module, Progressive):
                module.set_alpha(alpha)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _micro_batches(self, batch: int) -> Iterator[data_room.Batch]:
        """This rank's micro-batches of the global batch that begins at `self.images`.

        Rank r's micro-batch a is slice a * world + r of world * accumulation strided slices, so that the same global
        batch is cut the same way whether ranks or accumulation do it. A rank that has no share and does not wait gets
        another's.
        """
        accumulation = self.config.schedule.accumulation
        parts = self.active * accumulation
        for a in range(accumulation):
            slice_ = a * self.active + self.world.rank % self.active
            began = time.monotonic()
            micro = self.pipeline.batch(self.images, batch, rank=slice_, world=parts)
            self._waited += time.monotonic() - began
            yield micro

    def _backward(self, engine: Engine, name: str, loss: Tensor, seen: dict[str, Tensor]) -> None:
        """One micro-batch's part of a step. Engines that take the mean over all ranks get a loss that makes it one over
        those that have a share: what the others compute counts nothing, but meets them in the collectives."""
        if self.active < self.world.size and not self.has_subgroup:
            loss = loss * (self.world.size / self.active if self.world.rank < self.active else 0.0)
        engine.backward(loss)
        self.nonfinite.loss(f"loss of the {name}", loss)
        self.nonfinite.close_step()
        engine.step()
        if self.world.rank < self.active:
            self.meters.add(seen)

    def _discriminator_step(self, batch: int, after_generator: bool = True) -> list[Tensor]:
        assert self._engines is not None
        engine = self._engines[1]
        positions = []
        for micro in self._micro_batches(batch):
            real = micro.images.to(memory_format=self.memory_format)
            discriminator = self.step.discriminator
            if isinstance(discriminator, Progressive) and discriminator.fade:
                real = data_room.fade(real, discriminator.alpha)
            loss, seen = self.step.discriminator_loss(
                real, micro.positions, micro.labels, generator_first=not after_generator
            )
            self._backward(engine, "discriminator", loss, seen)
            positions.append(micro.positions)
        self.images += batch
        return positions

    def _generator_step(self, positions: list[Tensor]) -> None:
        assert self._engines is not None
        engine = self._engines[0]
        with frozen(self.step.discriminator):
            for micro in positions:
                loss, seen = self.step.generator_loss(micro)
                self._backward(engine, "generator", loss, seen)

    def train_step(self) -> None:
        """`n_critic` discriminator steps and one generator step, at the stage that the images seen ask for."""
        stage = stage_at(self.stages, self.images)
        while self.resolution < stage.resolution:
            self._grow(self.resolution * 2)
        self._set_alpha(stage)  # on ranks that wait too: they draw images for an evaluation
        if self.is_spectator:
            self.images += self.config.optimizer.n_critic * batch_at(self.config.schedule, self.resolution)
            self.steps += 1
            return
        with self.stragglers.step():
            self._step()

    def _step(self) -> None:
        assert self._engines is not None
        rate_g, rate_d = rates(self.config, self.images)
        self._engines[1].set_rate(rate_d)
        self.nonfinite.begin_step(self.steps)
        batch = batch_at(self.config.schedule, self.resolution)
        positions: list[Tensor] = []
        for i in range(self.config.optimizer.n_critic):
            positions = self._discriminator_step(batch, after_generator=i == 0)
        self._engines[0].set_rate(rate_g)
        self._generator_step(positions)
        self.steps += 1

    # --- state ------------------------------------------------------------------------------------------------------

    def raise_if_nonfinite(self) -> None:
        """Raises NonFiniteError on every rank if anything was not finite on any."""
        bad = self.nonfinite.first_bad(self.world.minimum(self.nonfinite.pending().clone()))
        if bad is not None:
            good = f"the last good checkpoint is {self._last_good}" if self._last_good else "there is no checkpoint yet"
            raise NonFiniteError(f"step {bad[0]}: {bad[1]} was not finite; {good}")

    def save(self) -> Path:
        """Checkpoint the run; a collective.

        Raises:
            NonFiniteError: something was not finite, so that nothing after the bad step is ever saved.
            ArgumentError: it could not be written.
        """
        self.raise_if_nonfinite()
        self._catch_up()
        assert self._engines is not None
        training = {
            "generator": dict(self.step.generator.state_dict()),
            "discriminator": dict(self.step.discriminator.state_dict()),
            "optimizer_g": self._engines[0].state(),
            "optimizer_d": self._engines[1].state(),
            "random": contents.random_state(self.world),
        }
        meta = {
            "version": __version__,
            "variant": self.variant,
            "networks": self.networks,
            "images": self.images,
            "steps": self.steps,
            "ema_steps": int(self.ema.steps.item()),
            "resolution": self.resolution,
            "world_size": self.world.size,
            **contents.settings(self.config),
            "data": self.pipeline.state_dict(),
        }
        ema, keep = dict(self.ema.module.state_dict()), self.config.run.keep
        self._last_good = contents.write(self.world, self.run_path, keep, meta, ema, training, self._last_good)
        return self._last_good

    def _restore(self, resume: Checkpoint) -> None:
        meta = resume.meta
        contents.check(resume, self.config, self._network_values(meta["resolution"]), self.stages)
        self.pipeline.load_state_dict(meta["data"])
        self.images, self.steps = meta["images"], meta["steps"]
        training = resume.training()
        self._enter(meta["resolution"], {**training, "ema": resume.generator()}, meta["ema_steps"])
        assert self._engines is not None
        self._engines[0].load_state(training.get("optimizer_g", {}))
        self._engines[1].load_state(training.get("optimizer_d", {}))
        if meta["world_size"] == self.world.size:
            torch.set_rng_state(training["random"][f"rank{self.world.rank}"])
        self._last_good = resume.path

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int | None:
        """Train to the end, or to a signal, which is then returned; a checkpoint is written either way.

        Raises:
            NonFiniteError: a loss or gradient was not finite.
        """
        with rank_log(self.run_path, self.world):
            LOGGER.info("begins at %g kimg, %d px, with %s", self.images / 1000, self.resolution, self.run_path)
            stopped = self._run()
            how = f"stopped by {signal.Signals(stopped).name}" if stopped else "done"
            LOGGER.info("%s at %g kimg", how, self.images / 1000)
            return stopped

    def _run(self) -> int | None:
        interval = intervals(self.config)
        log = Log(self.run_path, active=self.world.main, total=self.total, seen=self.images)
        self._logged_at = (time.monotonic(), self.images)
        self._tell_shares(log)
        try:
            with SignalHandler(self.world, self.config.system.timeout) as interrupt:
                while self.images < self.total:
                    before, resolution = self.images, self.resolution
                    self.train_step()
                    log.advance(self.images)
                    if self.resolution > resolution:
                        log.line(self.pipeline.describe())
                        self._tell_shares(log)

                    def due(kimg: float, before: int = before) -> bool:
                        return int(self.images / (1000 * kimg)) > int(before / (1000 * kimg))

                    if due(interval["log"]) or self.images >= self.total:
                        self._log(log)
                    if due(interval["sample"]):
                        self._sample(log)
                    if self._evaluator is not None and (due(interval["evaluate"]) or self.images >= self.total):
                        self._evaluate(log, self._evaluator)
                    stop = interrupt.should_stop()
                    if stop or (due(interval["checkpoint"]) and self.images < self.total):
                        self.save()
                    if stop:
                        return interrupt.signal or signal.SIGTERM
                self._sample(log)
                self.save()
            return None
        finally:
            log.close()
            self.pipeline.close()
            self._close_engines()

    def _tell_shares(self, log: Log) -> None:
        if self.active < self.world.size:
            batch = batch_at(self.config.schedule, self.resolution)
            log.line(
                f"{self.resolution} px: the batch of {batch} keeps {self.active} of {self.world.size} ranks at work; "
                f"all with {batches_for_all(self.config.schedule, self.world.size)}"
            )

    def _log(self, log: Log) -> None:
        self.raise_if_nonfinite()
        names = self.step.metrics
        sums, counts = self.world.sum(self.meters.totals(names, self.world.device)).tolist()
        values = [total / count for total, count in zip(sums, counts, strict=True)]
        self.meters.clear()
        now, (then, images) = time.monotonic(), self._logged_at
        self._logged_at = (now, self.images)
        waited, self._waited = self._waited, 0.0
        stage = stage_at(self.stages, self.images)
        pace = self.stragglers.row(self.active if self.has_subgroup else self.world.size, log.line)
        log.metrics(
            {
                "images": self.images,
                "step": self.steps,
                "resolution": self.resolution,
                "alpha": stage.alpha(self.images) if stage.resolution == self.resolution else 1.0,
                "images_per_second": (self.images - images) / max(now - then, 1e-9),
                # The time from asking for batches to having them, as a share of all.
                "data_share": waited / max(now - then, 1e-9),
                **dict(zip(names, values, strict=True)),
                **pace,
            }
        )

    def _sample(self, log: Log) -> None:
        self.wait()
        if self.world.main:
            images = sample_images(self.ema.module, self.config.run.samples, self.config.run.seed, self.networks)
            path = self.run_path / "samples" / f"kimg-{self.images / 1000:010.3f}.png"
            log.images(images, path, self.images, self.config.schedule.resolution)

    def _open_evaluator(self) -> Evaluator | None:
        run = self.config.run
        if run.evaluate_kimg is None:
            return None
        from fastgan.training.evaluator import Evaluator

        return Evaluator(self.source, run.evaluate_n, run.evaluate_features, run.seed, self.world.device)

    def _evaluate(self, log: Log, evaluator: Evaluator) -> None:
        """A collective. The time it takes is not counted as training's."""
        from fastgan.training.evaluator import append

        began = time.monotonic()
        self._catch_up()
        if self.world.size > 1:
            # All ranks draw, with the batch-norm statistics that are saved.
            broadcast_tensors(self.ema.module.buffers())
        meta = {"variant": self.variant, "networks": self.networks, "images": self.images}
        record = evaluator(self.ema.module, meta)
        if record is not None:
            append(self.run_path, record)
            log.evaluation(self.images, record)
        then, images = self._logged_at
        self._logged_at = (then + time.monotonic() - began, images)
