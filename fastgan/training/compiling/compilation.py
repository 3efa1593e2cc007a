"""When a stage runs compiled: `--compile`, the same on every rank."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from fastgan.config import Config, active_ranks, batch_at
from fastgan.config.growth import Stage, stage_at
from fastgan.training.compiling.build import forget_failure
from fastgan.training.compiling.build_process import ProgramBuilder
from fastgan.training.compiling.programs import ProgramSpec, StagePrograms, load
from fastgan.training.distributed.deepspeed_engine import uses_own_reducer
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.from_config import engine_settings
from fastgan.training.observability.rank_log import LOGGER
from fastgan.training.stage import ActiveStage

# Assumed before anything is measured: a compiled step saves this share of a step's time, and compiling both programs
# of a stage takes this long, beside training.
_SAVED, _COMPILE_SECONDS = 0.25, 90.0
_WARM_UP_SECONDS = 20.0  # of training, whose speed says nothing yet


def unsupported_reason(config: Config, world: ProcessGroup) -> str | None:
    """Why no stage of this run can be compiled, or None."""
    if sys.platform == "win32":
        return "it is not supported on Windows"
    if config.system.device == "mps":
        return "programs for mps are not made"
    if config.system.sync_bn:
        return "--sync-bn communicates inside the step"
    if config.system.precision == "fp16":
        return "--precision fp16 scales its losses by a factor that changes"
    if world.engine == "deepspeed" and not uses_own_reducer(
        engine_settings(config, config.schedule.resolution, world.size)
    ):
        return "ZeRO 1 and 2, and DeepSpeed's own reductions, need its backward pass"
    return None


class Compilation:
    """Compiles the stages of a run beside it, and switches each to its programs once they are ready.

    Every rank calls the same methods at the same steps, so all switch together. The first rank of each host compiles.

    Args:
        config: of the run.
        world: the ranks.
        stages: of the run.
        channels, num_classes: of the images.
    """

    def __init__(
        self, config: Config, world: ProcessGroup, stages: list[Stage], *, channels: int, num_classes: int
    ) -> None:
        self._config, self._world, self._stages = config, world, stages
        self._channels, self._num_classes = channels, num_classes
        reason = unsupported_reason(config, world)
        # What is timed differs from run to run, so `auto` may not decide where runs must be the same.
        wanted = config.system.compile == "on" or (config.system.compile == "auto" and not config.system.deterministic)
        self.enabled = wanted and reason is None
        self._notes = [f"--compile: off, {reason}"] if reason is not None and config.system.compile == "on" else []
        self._builder: ProgramBuilder | None = None
        self._phase: tuple[ActiveStage, bool] | None = None
        self._first_log: float | None = None
        self._settled = False  # whether the form of the phase is decided
        self.resumes_compiled = False
        """Whether the run that is resumed was compiled where it stopped; it then waits for its programs."""

    def _spec(self, resolution: int, fade: bool) -> ProgramSpec:
        schedule = self._config.schedule
        batch = batch_at(schedule, resolution)
        active = active_ranks(batch, self._world.size, schedule.accumulation)
        assert active is not None
        micro_batch = batch // (active * schedule.accumulation)
        return ProgramSpec(self._config, resolution, fade, self._channels, self._num_classes, micro_batch)

    def _phases(self, images: int) -> list[tuple[Stage, bool, int]]:
        """(stage, whether it fades in, images left) of what the run has still to train, in order."""
        first, found = stage_at(self._stages, images), []
        for stage in self._stages[self._stages.index(first) :]:
            for fade, start, end in ((True, stage.start, stage.fade_end), (False, stage.fade_end, stage.end)):
                left = end - max(start, images)
                if left > 0:
                    found.append((stage, fade, left))
        return found

    def follow(self, stage: ActiveStage, images: int) -> float:
        """Choose the form of a phase where one begins: new networks, or the end of a fade; a collective there.

        Args:
            stage: the networks.
            images: seen so far.

        Returns:
            Seconds that were spent on it.
        """
        if not self.enabled or self._phase == (stage, stage.fades):
            return 0.0
        began = time.monotonic()
        if self._phase is None and os.environ.get("LOCAL_RANK", "0") == "0":
            for planned, fade, _ in self._phases(images):
                forget_failure(self._spec(planned.resolution, fade), self._world.device)
        self._phase, self._settled = (stage, stage.fades), False
        stage.use(None)
        waits = self._config.system.deterministic or self.resumes_compiled
        if self._builder is None and (waits or self._config.system.compile == "on"):
            self._start(images, lambda *_: True)
        if waits:
            self._wait(stage)
        self.resumes_compiled = False
        self._switch(stage, images)
        return time.monotonic() - began

    def at_log(self, stage: ActiveStage, images: int, images_per_second: float) -> None:
        """Start to compile if that will be earned back, and switch to programs that have become ready; a collective."""
        if not self.enabled:
            return
        if stage.refusal is not None:
            self._notes.append(f"{stage.resolution} px: eager, {stage.refusal}")
            stage.refusal = None
        self._first_log = self._first_log or time.monotonic()
        warm = time.monotonic() - self._first_log > _WARM_UP_SECONDS
        if self._builder is None and self._config.system.compile == "auto" and warm:

            def earned(planned: Stage, left: int) -> bool:
                # A step of twice the resolution takes at least about twice as long.
                factor = 2.0 ** ((planned.resolution // stage.resolution).bit_length() - 1)
                return _SAVED * factor * left / max(images_per_second, 1e-9) > _COMPILE_SECONDS

            self._start(images, earned)
        if not self._settled:
            self._switch(stage, images)

    def _start(self, images: int, wanted: Callable[[Stage, int], bool]) -> None:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        phases = [(planned.resolution, fade) for planned, fade, left in self._phases(images) if wanted(planned, left)]
        specs = [spec for spec in (self._spec(*phase) for phase in phases) if not spec.compiled(self._world.device)]
        if specs:
            self._builder = ProgramBuilder(specs, self._world.device)

    def _wait(self, stage: ActiveStage) -> None:
        """Until the programs of a phase are in the cache; a collective."""
        spec, announced = self._spec(stage.resolution, stage.fades), False
        while self._builder is not None and self._builder.running() and not spec.compiled(self._world.device):
            if not announced:
                LOGGER.info("compiling %s", spec)
                announced = True
            time.sleep(0.2)
        self._world.agree(True)

    def _switch(self, stage: ActiveStage, images: int) -> None:
        spec = self._spec(stage.resolution, stage.fades)
        found: StagePrograms | str | None = load(spec, stage.step)
        if found is None and self._builder is not None:
            found = self._builder.failure()
        auto = self._config.system.compile == "auto"
        if isinstance(found, StagePrograms) and auto and found.compiled_ms >= found.eager_ms:
            found = f"a compiled step takes {found.compiled_ms:.3g} ms, an eager one {found.eager_ms:.3g} ms"
        # Ranks agree on whether all know, and then on whether all can.
        decided, usable = self._world.agree(found is not None, isinstance(found, StagePrograms))
        if not decided:
            return
        self._settled = True
        if isinstance(found, StagePrograms) and usable:
            stage.use(found)
            gain = f"{found.eager_ms / found.compiled_ms:.2f}x eager's speed when it was compiled"
            self._notes.append(f"{spec}: compiled from {images / 1000:g} kimg on ({gain})")
        else:
            self._notes.append(f"{spec}: eager, {found if isinstance(found, str) else 'as on another rank'}")

    def notes(self) -> list[str]:
        """New lines for the log."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Stop compiling."""
        if self._builder is not None:
            self._builder.close()
