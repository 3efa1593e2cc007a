"""The networks of one resolution, the engines that train them, and their training step.

A growth closes one `ActiveStage` and builds the next from its state.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan import data
from fastgan.config import Config, active_ranks, batch_at, batches_for_all
from fastgan.models.pggan import Progressive
from fastgan.training.augmentation import ADAPT_IMAGES, Adaptive
from fastgan.training.compiling.micro_step import MicroSteps, real_images
from fastgan.training.compiling.program_check import compare
from fastgan.training.compiling.programs import StagePrograms
from fastgan.training.distributed.deepspeed_engine import DeepSpeedEngine, uses_own_reducer
from fastgan.training.distributed.engine import Engine
from fastgan.training.distributed.process_group import ProcessGroup, broadcast_tensors
from fastgan.training.distributed.torch_engine import TorchEngine
from fastgan.training.ema import Ema
from fastgan.training.from_config import (
    build_augmentation,
    build_step,
    engine_settings,
    memory_format,
    network_values,
    optimizer_factory,
)
from fastgan.training.loss_scale import LossScales
from fastgan.training.networks import build_networks, inherit
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.nonfinite import NonFiniteDetector
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.step import frozen

Seen = tuple[Tensor] | tuple[Tensor, Tensor, Tensor | None]
"""Arguments of `Step.generator_loss`: the positions of a micro-batch and, for a paired loss, images and labels."""
State = dict[str, dict[str, Tensor]]
"""State dicts by network: "generator", "discriminator" and "ema"; "augmentation" is that of an augmentation."""


@dataclass(frozen=True)
class RankShare:
    """Which ranks share the batches of a stage.

    Attributes:
        active: how many ranks share a batch: the first ones.
        has_subgroup: whether active ranks average their gradients among themselves, while the others wait.
        is_spectator: whether this rank is one that waits, with weights that are out of date.
        group: process group of the active ranks, where they have one of their own.
    """

    active: int
    has_subgroup: bool
    is_spectator: bool
    group: Any

    @staticmethod
    def of(config: Config, world: ProcessGroup, resolution: int, groups: dict[int, Any]) -> RankShare:
        """The share of a stage; a collective. `groups` keeps process groups by size, as each is made once a run."""
        schedule = config.schedule
        active = active_ranks(batch_at(schedule, resolution), world.size, schedule.accumulation) or world.size
        subgroup = active < world.size and uses_own_reducer(engine_settings(config, resolution, world.size))
        if subgroup and active not in groups:
            limit = datetime.timedelta(seconds=config.system.timeout)
            groups[active] = dist.new_group(list(range(active)), timeout=limit)
        return RankShare(active, subgroup, subgroup and world.rank >= active, groups[active] if subgroup else None)


class ActiveStage:
    """Networks, engines and moving average at one resolution. Building one is a collective.

    Args:
        config: of the run; `validate_stages` has passed.
        world: the ranks.
        resolution: in pixels.
        channels, num_classes: of the images.
        stragglers: measures the time that ranks wait for each other.
        meters: collect what steps log.
        scales: of the losses in float16; None: another precision.
        groups: see `RankShare.of`.
        state: weights to start from, of this stage or, with `grown`, of the one below; None: new ones. Without a
            "discriminator", its weights are new.
        ema_steps: updates of the moving average so far.

    Attributes:
        networks: the values that `models.build` made the networks from.
        step: computes the losses on `step.generator` and `step.discriminator`.
        ema: moving average of the generator.
        nonfinite: watches losses and gradients.
        programs: compute losses and gradients in place of `step`, if there are any; see `use`.
        share: which ranks share a batch.
        generator_engine, discriminator_engine: own the optimizers.
    """

    def __init__(
        self,
        config: Config,
        world: ProcessGroup,
        resolution: int,
        *,
        channels: int,
        num_classes: int,
        stragglers: StragglerDetector,
        meters: Meters,
        scales: LossScales | None = None,
        groups: dict[int, Any],
        state: State | None = None,
        ema_steps: int = 0,
        grown: bool = False,
    ) -> None:
        self.config, self.world, self.resolution = config, world, resolution
        self._stragglers, self._meters, self._scales = stragglers, meters, scales
        self.networks = network_values(
            config.networks, resolution=resolution, channels=channels, num_classes=num_classes
        )
        generator, discriminator = build_networks(config, self.networks)
        load = inherit if grown else nn.Module.load_state_dict
        if state is not None:
            load(generator, state["generator"])
            if "discriminator" in state:
                load(discriminator, state["discriminator"])
        generator, discriminator = generator.to(world.device), discriminator.to(world.device)
        self.ema = Ema(generator, config.optimizer.ema_decay, config.optimizer.ema_warmup)
        if state is not None:
            load(self.ema.module, state["ema"])
        self.ema.steps.fill_(ema_steps)
        self.nonfinite = NonFiniteDetector(world.device)
        if scales is None:  # else gradients may overflow, and the scales watch them
            hooks = world.engine != "torch" and not uses_own_reducer(engine_settings(config, resolution, world.size))
            for name, module in (("discriminator", discriminator), ("generator", generator)):
                self.nonfinite.watch(name, module, hooks=hooks)
        for name in ("discriminator", "generator"):  # spectators, which compute no loss, watch one too
            self.nonfinite.loss(f"loss of the {name}", torch.zeros((), device=world.device))
        self.share = RankShare.of(config, world, resolution, groups)
        self.generator_engine = self._engine(generator, discriminator=False)
        self.discriminator_engine = self._engine(discriminator, discriminator=True)
        self.ema.module.to(memory_format=self.generator_engine.memory_format)
        modules = (self.generator_engine.module, self.discriminator_engine.module)
        augmentation = build_augmentation(config, channels, world.device)
        self.step = build_step(config, *modules, num_classes, augmentation)
        if scales is not None:
            self.step.penalty_scale = scales.discriminator.value
        self.programs: StagePrograms | None = None
        self.refusal: str | None = None
        self._unchecked: set[str] = set()
        if augmentation is not None and state is not None:
            augmentation.load_state_dict(state.get("augmentation", {}), strict=False)  # there is none of an older run
            self._keep_on_first_rank()

    def _engine(self, module: nn.Module, *, discriminator: bool) -> Engine:
        config, world = self.config, self.world
        scale = None if self._scales is None else self._scales.of("discriminator" if discriminator else "generator")
        make = optimizer_factory(config, discriminator=discriminator, scale=scale)
        on_update = None if discriminator else lambda: self.ema.update(self.step.generator)
        if world.engine == "torch":
            waiting = self._stragglers.waiting if world.size > 1 else None
            accumulation, layout = config.schedule.accumulation, memory_format(config)
            return TorchEngine(module, make, accumulation, layout, on_update, waiting, self.share.group)
        return DeepSpeedEngine(
            module,
            make,
            engine_settings(config, self.resolution, world.size, overlap=world.device.type == "cuda"),
            self._stragglers.waiting,
            config.system.timeout,
            memory_format(config),
            self.share.group,
            on_update,
        )

    @property
    def engines(self) -> tuple[Engine, Engine]:
        """Those of the generator and of the discriminator."""
        return self.generator_engine, self.discriminator_engine

    @property
    def modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Generator, discriminator and the generator's moving average."""
        return self.step.generator, self.step.discriminator, self.ema.module

    @property
    def fades(self) -> bool:
        """Whether the newest level of progressive networks is blended in."""
        return isinstance(self.step.generator, Progressive) and self.step.generator.fade

    def set_alpha(self, alpha: float) -> None:
        """Blend the newest level of progressive networks in by `alpha`, 0 to 1; others have none."""
        for module in self.modules:
            if isinstance(module, Progressive):
                module.set_alpha(alpha)

    # --- steps ------------------------------------------------------------------------------------------------------

    def discriminator_step(
        self, micro_batches: Iterable[data.Batch], *, generator_first: bool = False, penalize: bool = False
    ) -> list[Seen]:
        """One step of the discriminator.

        Args:
            micro_batches: this rank's part of the batch.
            generator_first: see `Step.discriminator_loss`; False right after a step of the generator.
            penalize: whether a `penalty_step` on the same images follows.

        Returns:
            What the generator's step takes of each micro-batch.
        """
        if penalize:
            micro_batches = list(micro_batches)
        taken: list[Seen] = []
        for micro in micro_batches:
            if self.programs is not None:
                inputs = self.programs.inputs(micro.images, micro.positions, micro.labels)
                self._run_program(self.programs, "discriminator", inputs)
                taken.append(self._seen_by_generator(micro))
                continue
            real = real_images(micro.images, self.step.discriminator, memory_format(self.config))
            loss, seen = self.step.discriminator_loss(
                real, micro.positions, micro.labels, generator_first=generator_first
            )
            self._backward(self.discriminator_engine, "discriminator", loss, seen)
            taken.append(self._seen_by_generator(micro, real))
        if penalize:
            self.penalty_step(micro_batches)
        return taken

    def penalty_step(self, micro_batches: Iterable[data.Batch]) -> None:
        """One step of the discriminator by the penalty alone, on the images of its last step; see `penalty_every`."""
        for micro in micro_batches:
            if self.programs is not None:
                inputs = self.programs.inputs(micro.images, micro.positions, micro.labels)
                self._run_program(self.programs, "penalty", inputs)
                continue
            real = real_images(micro.images, self.step.discriminator, memory_format(self.config))
            loss, seen = self.step.penalty_loss(real, micro.positions, micro.labels)
            self._backward(self.discriminator_engine, "discriminator", loss, seen)

    def _seen_by_generator(self, micro: data.Batch, real: Tensor | None = None) -> Seen:
        if not self.step.loss.paired:
            return (micro.positions,)
        if real is None:
            real = real_images(micro.images, self.step.discriminator, memory_format(self.config))
        return micro.positions, real, micro.labels if self.step.num_classes else None

    def generator_step(self, taken: list[Seen]) -> None:
        """One step of the generator on the positions of the discriminator's last step."""
        with frozen(self.step.discriminator):
            for micro in taken:
                if self.programs is not None:
                    self._run_program(self.programs, "generator", [x for x in micro if x is not None])
                    continue
                loss, seen = self.step.generator_loss(*micro)
                self._backward(self.generator_engine, "generator", loss, seen)

    def use(self, programs: StagePrograms | None) -> None:
        """Compute losses and gradients by `programs` from now on; None: in eager mode.

        The first micro-batch of each program is computed in both ways. If they differ, the stage stays in eager mode
        and `refusal` says so.
        """
        self.programs = programs
        self._unchecked = set() if programs is None else set(programs.spec.names)

    def _run_program(self, programs: StagePrograms, name: str, inputs: list[Tensor]) -> None:
        """One micro-batch by the program `name`."""
        for engine in self.engines:  # a program reads the weights of both networks
            engine.wait()
        if name in self._unchecked:
            self._unchecked.discard(name)
            eager = MicroSteps(self.step, self.config.schedule.accumulation, memory_format(self.config))
            buffers = [x for module in self.step.modules().values() for x in module.buffers()]
            compared = compare(programs, name, inputs, getattr(eager, name), buffers)
            if not compared.accepted:
                self.refusal = f"the compiled {name} differs from eager by {compared.difference:.1e} of the norm"
                self.use(None)
            found = compared.used
        else:
            found = programs.run(name, *inputs)
        network = "generator" if name == "generator" else "discriminator"
        engine = self.generator_engine if name == "generator" else self.discriminator_engine
        engine.accumulate(found.gradients)
        self.nonfinite.gradients(network, found.largest)
        self._finish(engine, network, found.loss, found.seen)

    def _backward(self, engine: Engine, name: str, loss: Tensor, seen: dict[str, Tensor]) -> None:
        """Backward and step of one micro-batch.

        Engines that average over all ranks get a loss that makes it the mean over active ones: the others compute a
        loss of weight zero, which takes part in the collectives.
        """
        active, world = self.share.active, self.world
        if active < world.size and not self.share.has_subgroup:
            loss = loss * (world.size / active if world.rank < active else 0.0)
        if self._scales is None:
            engine.backward(loss)
            self.nonfinite.gradients(name)
            self._finish(engine, name, loss, seen)
        else:
            scale = self._scales.of(name)
            engine.backward(loss * scale.value)
            self._finish(engine, name, scale.failure, self._scales.finite(seen))

    def _finish(self, engine: Engine, name: str, loss: Tensor, seen: dict[str, Tensor]) -> None:
        """Watch a micro-batch's results, finish it in its engine, and log them."""
        self.nonfinite.loss(f"loss of the {name}", loss)
        self.nonfinite.close_step()
        engine.step()
        if self.world.rank < self.share.active:
            self._meters.add(seen)

    def discard_step(self) -> None:
        """Forget a step that failed half-way."""
        self.nonfinite.discard_step()
        for engine in self.engines:
            engine.discard_step()

    def adapt_augmentation(self, before: int, after: int) -> None:
        """Adapt the strength of the augmentation, if it is due by the real images seen before and after a step.

        A collective of the active ranks, and the same on any number of them: the sums are of integers.
        """
        augmentation = self.step.augmentation
        if not isinstance(augmentation, Adaptive) or before // ADAPT_IMAGES == after // ADAPT_IMAGES:
            return
        if self.world.size > 1:
            with self._stragglers.waiting():
                self._sum_statistics(augmentation, self.share.group)
        augmentation.adapt()

    def _sum_statistics(self, augmentation: Adaptive, group: Any) -> None:
        totals = torch.stack([augmentation.signs, augmentation.seen])
        if self.world.rank >= self.share.active:
            totals.zero_()  # of images that another rank has seen too
        dist.all_reduce(totals, group=group)
        augmentation.signs.copy_(totals[0])
        augmentation.seen.copy_(totals[1])

    def _keep_on_first_rank(self) -> None:
        """Drop what the statistics of an adaptive augmentation are on other ranks: the first one has the sums."""
        if self.world.rank > 0 and isinstance(self.step.augmentation, Adaptive):
            self.step.augmentation.signs.zero_()
            self.step.augmentation.seen.zero_()

    # --- state ------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Finish the last step: pending all-reduces and the updates that wait for them; a collective.

        Called before anything but a step uses the weights or their average.
        """
        with self._stragglers.continue_step():
            for engine in self.engines:
                engine.wait()

    def synchronize(self) -> None:
        """`wait`, and give spectators the weights of the first rank; a collective, before weights are used or saved."""
        self.wait()
        if self.share.has_subgroup:
            broadcast_tensors([tensor for module in self.modules for tensor in module.state_dict().values()])
            broadcast_tensors([self.ema.steps])
            broadcast_tensors([] if self._scales is None else self._scales.state().values())
        if self.world.size > 1 and isinstance(self.step.augmentation, Adaptive):
            self._sum_statistics(self.step.augmentation, None)
            self._keep_on_first_rank()
            if self.share.has_subgroup:
                broadcast_tensors([self.step.augmentation.strength])

    def state(self) -> State:
        """Weights on the CPU, after `synchronize`, for the stage that grows from this one."""
        modules: dict[str, nn.Module] = dict(zip(("generator", "discriminator", "ema"), self.modules, strict=True))
        if self.step.augmentation is not None:
            modules["augmentation"] = self.step.augmentation
        return {
            name: {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }

    def state_tensors(self) -> list[Tensor]:
        """What steps change besides networks, moving average and optimizers: running sums and scales."""
        return [*self._meters.tensors(), *(() if self._scales is None else self._scales.tensors())]

    def close(self) -> None:
        """Give up the engines and what they hold."""
        for engine in self.engines:
            engine.close()

    def notes(self) -> list[str]:
        """Lines for the log: which ranks have no part in the batch, if there are any."""
        if self.share.active == self.world.size:
            return []
        batch = batch_at(self.config.schedule, self.resolution)
        return [
            f"{self.resolution} px: the batch of {batch} keeps {self.share.active} of {self.world.size} ranks active; "
            f"all of them with {batches_for_all(self.config.schedule, self.world.size)}"
        ]
