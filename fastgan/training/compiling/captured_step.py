"""A whole training step as one program on static buffers: on a GPU a CUDA graph, elsewhere its recorded operations.

A step of a stage, eager or by programs, is the same operations on the same tensors every time. What differs between two
steps is written into tensors before it: images, positions and labels, the step's number, the blend of a fade, the
learning rates. So one recording of it, both networks' backward passes, optimizers, moving average and checks included,
can be repeated by a single call, which takes the host out of the step. `StaticStep` is that step; `capture` records it;
`CapturedStep` uses the recording once it has done what an ordinary step does.

The CPU's form, whose operations run one by one, exists to show without a GPU that nothing in a step depends on Python.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan.compiled.program import difference_of
from fastgan.data import Batch
from fastgan.training.compiling.program_check import restore
from fastgan.training.distributed.deepspeed_engine import uses_own_reducer
from fastgan.training.distributed.engine import BaseEngine
from fastgan.training.from_config import engine_settings
from fastgan.training.stage import ActiveStage
from fastgan.utils.text import first_line

WARM_UP_STEPS = 3
"""Ordinary steps before a capture: cuDNN chooses algorithms, kernels are compiled, optimizers make their state."""
TOLERANCE = 1e-3
"""Largest accepted difference of weights and state after one step to those of an eager one, relative to their norm."""


def unsupported_reason(stage: ActiveStage) -> str | None:
    """Why the steps of a stage cannot be captured, or None."""
    config, world = stage.config, stage.world
    if world.size > 1:
        return "gradients are averaged between ranks"
    if world.engine == "deepspeed" and not uses_own_reducer(engine_settings(config, stage.resolution, world.size)):
        return "ZeRO 1 and 2, and DeepSpeed's own reductions, decide on the host"
    if config.optimizer.optimizer == "rmsprop" and config.optimizer.lr_decay and world.device.type == "cpu":
        return "on a CPU torch's RMSprop takes its rate from the host"
    return None


def _optimizers(stage: ActiveStage) -> list[torch.optim.Optimizer]:
    return [engine._optimizer for engine in stage.engines if isinstance(engine, BaseEngine)]


def _rate_from_tensor(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have the optimizer read its rate from the device, and keep all of its state there."""
    for group in optimizer.param_groups:
        in_place = device.type == "cuda" or group.get("fused")
        if in_place and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
        if device.type == "cuda" and "capturable" in group:
            group["capturable"] = True
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(device)


class StaticStep:
    """`n_critic` steps of the discriminator and one of the generator, on buffers that stay where they are.

    The host does nothing in it: steps and images are counted, and the rates, the blend and the number of the step set,
    outside.

    Args:
        stage: `unsupported_reason` is None.
        example: this rank's micro-batches of one step, all discriminator steps after each other; their values are not
            used.
    """

    def __init__(self, stage: ActiveStage, example: Sequence[Batch]) -> None:
        self.stage = stage
        self._n_critic = stage.config.optimizer.n_critic
        self._inputs = [Batch(*(None if x is None else x.clone() for x in batch)) for batch in example]  # type: ignore[arg-type]
        for optimizer in _optimizers(stage):
            _rate_from_tensor(optimizer, stage.world.device)

    def load(self, batches: Sequence[Batch]) -> None:
        """Copy the micro-batches of a step into the buffers."""
        for own, given in zip(self._inputs, batches, strict=True):
            for buffer, value in zip(own, given, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value, non_blocking=True)

    def run(self, penalize: tuple[bool, ...] = ()) -> None:
        """The step, on what `load` was last given; `penalize`: see `CapturedStep.step`."""
        micro = len(self._inputs) // self._n_critic
        for i in range(self._n_critic):
            batches = self._inputs[i * micro : (i + 1) * micro]
            alone = bool(penalize) and penalize[i]
            taken = self.stage.discriminator_step(batches, generator_first=i > 0, penalize=alone)
        self.stage.generator_step(taken)


def _changed(stage: ActiveStage) -> Iterator[Tensor]:
    """All that outlives a step and that a step changes."""
    modules: list[nn.Module] = [*stage.modules]
    if stage.step.augmentation is not None:
        modules.append(stage.step.augmentation)
    for module in modules:
        yield from (x.detach() for x in (*module.parameters(), *module.buffers()))
    yield stage.ema.steps
    yield from stage.nonfinite.tensors()
    yield from stage.state_tensors()
    for optimizer in _optimizers(stage):
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record `run`, which changes nothing while it is recorded on a GPU, and is run once on a CPU.

    Args:
        run: has been called before on this device, for what takes place once.
        device: where it runs.

    Raises:
        RuntimeError: on a GPU, `run` does what a graph cannot hold.
    """
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        # Threads that load data go on calling CUDA meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def recorded() -> Tensor:
        run()
        return torch.zeros(())

    program = make_fx(recorded)()

    def replay() -> None:
        with torch.no_grad():
            program()

    return replay


class CapturedStep:
    """Steps of one phase of a stage, captured after the first ones; a new phase (a growth, a fade's end) needs another.

    Steps that are followed by a penalty of their own (`penalty_every`) are captured apart from those that are not.

    Args:
        stage: `unsupported_reason` is None. Its form, eager or by programs, does not change.

    Attributes:
        refusal: why steps are not captured, once that is known.
        difference: of a captured step to one that is not, once that is known.
    """

    def __init__(self, stage: ActiveStage) -> None:
        self._stage = stage
        self._static: StaticStep | None = None
        self._replays: dict[tuple[bool, ...], Callable[[], None]] = {}
        self._done: Counter[tuple[bool, ...]] = Counter()
        # With 0, captured steps have the bits of others, which a run that is resumed begins with.
        self._tolerance = 0.0 if stage.config.system.deterministic else TOLERANCE
        self.refusal: str | None = None
        self.difference: float | None = None

    @property
    def captured(self) -> bool:
        """Whether steps are replayed, after those that warm up."""
        return bool(self._replays)

    def step(self, batches: Sequence[Batch], penalize: tuple[bool, ...] = ()) -> None:
        """One step; the number of the step, rates and blend have been set.

        Args:
            batches: its micro-batches.
            penalize: for each discriminator step, whether one of the penalty alone follows; empty: none.
        """
        if self._static is None:
            self._static = StaticStep(self._stage, batches)
        self._static.load(batches)
        run = functools.partial(self._static.run, penalize)
        if penalize in self._replays:
            self._replays[penalize]()
        elif self.refusal is None and self._done[penalize] >= WARM_UP_STEPS:
            self._capture(penalize, run)  # it takes this step
        else:
            run()
        self._done[penalize] += 1

    def _capture(self, penalize: tuple[bool, ...], run: Callable[[], None]) -> None:
        """Capture the step, and do it in both ways from the same state. Reads from the device."""
        device = self._stage.world.device
        tensors = list(_changed(self._stage))
        before = [x.clone() for x in tensors]
        run()
        expected = [x.clone() for x in tensors]
        restore(tensors, before)
        try:
            replay = capture(run, device)
        except RuntimeError as error:
            self._stage.discard_step()
            restore(tensors, expected)
            self._refuse(f"the step cannot be captured: {first_line(error)}")
            return
        restore(tensors, before)
        replay()
        pairs = list(zip(tensors, expected, strict=True))
        floating = [(x, y) for x, y in pairs if x.is_floating_point()]
        self.difference = difference_of([x for x, _ in floating], [y for _, y in floating])
        counts_agree = all(torch.equal(x, y) for x, y in pairs if not x.is_floating_point())
        if self.difference <= self._tolerance and counts_agree:
            self._replays[penalize] = replay
        else:
            restore(tensors, expected)
            self._refuse(f"a captured step differs from an eager one by {self.difference:.1e} of the norm")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the graph has memory of its own

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self._replays.clear()
