"""When the steps of a run are captured: `--capture`."""

from __future__ import annotations

from fastgan.config import Config, batch_at
from fastgan.data import Batch
from fastgan.training.compiling.captured_step import CapturedStep, unsupported_reason
from fastgan.training.compiling.programs import StagePrograms
from fastgan.training.feed import Feed
from fastgan.training.from_config import penalty_is_due
from fastgan.training.stage import ActiveStage

_DEVICES = ("cuda",)


class Capturing:
    """Captures the steps of each phase of each stage, once it has warmed up.

    A phase here ends with a growth, with the end of a fade, and where a stage switches to its programs or back.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._enabled = config.system.capture
        self._phase: tuple[ActiveStage, bool, StagePrograms | None] | None = None
        self._step: CapturedStep | None = None
        self._notes: list[str] = []
        self._announced = False

    def follow(self, stage: ActiveStage) -> bool:
        """Whether `step` takes the next step of `stage`."""
        if not self._enabled:
            return False
        phase = (stage, stage.fades, stage.programs)
        if self._phase != phase:
            self._phase, self._step, self._announced = phase, None, False  # the memory of the last one is free now
            device = stage.world.device.type
            reason = unsupported_reason(stage) if device in _DEVICES else f"a {device} has no graphs"
            if reason is None:
                self._step = CapturedStep(stage)
            else:
                self._enabled = False  # the same in every phase
                self._notes.append(f"--capture: off, {reason}")
        return self._step is not None

    def step(self, stage: ActiveStage, feed: Feed, images: int) -> int:
        """One step of both networks after `images`, where `follow` says so; rates have been set.

        Returns:
            The images seen after it.
        """
        assert self._step is not None
        micro_batches: list[Batch] = []
        penalize: list[bool] = []
        batch = batch_at(self._config.schedule, stage.resolution)
        for _ in range(self._config.optimizer.n_critic):
            micro_batches += feed.micro_batches(images, batch, stage.share)
            penalize.append(penalty_is_due(self._config, images, batch))
            images += batch
        self._step.step(micro_batches, tuple(penalize))
        return images

    def form(self, stage: ActiveStage) -> str:
        """How the last step was taken: "eager" or "compiled", and ", captured"."""
        form = "eager" if stage.programs is None else "compiled"
        return f"{form}, captured" if self._step is not None and self._step.captured else form

    def notes(self, images: int) -> list[str]:
        """New lines for the log, after a step up to `images`."""
        step = self._step
        if step is not None and not self._announced and (step.captured or step.refusal is not None):
            self._announced = True
            assert self._phase is not None
            stage, fades, _ = self._phase
            phase = f"{stage.resolution} px{', fading in' if fades else ''}"
            captured = f"captured from {images / 1000:g} kimg on"
            self._notes.append(f"{phase}: {captured if step.refusal is None else f'not captured, {step.refusal}'}")
        notes, self._notes = self._notes, []
        return notes
