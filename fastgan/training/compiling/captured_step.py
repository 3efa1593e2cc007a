"""A whole training step as one program on static buffers: on a GPU a CUDA graph, elsewhere its recorded operations.

A step of a stage is the same operations on the same tensors every time. What differs between two steps is written into
tensors before it: images, positions and labels, the step's number, the blend of a fade, the learning rates. So one
recording of it, both networks' backward passes, optimizers, moving average and checks included, can be repeated by a
single call, which takes the host out of the step. `StaticStep` is that step; `capture` records it; `CapturedStep` uses
the recording once it has done what an ordinary step does.

The CPU's form, whose operations run one by one, exists to show without a GPU that nothing in a step depends on Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan.compiled.program import difference_of
from fastgan.data import Batch
from fastgan.training.distributed.engine import BaseEngine
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
    if world.engine != "torch":
        return "DeepSpeed's engine counts steps on the host"
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
        stage: in eager mode; `unsupported_reason` is None.
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

    def run(self) -> None:
        """The step, on what `load` was last given."""
        micro = len(self._inputs) // self._n_critic
        for i in range(self._n_critic):
            batches = self._inputs[i * micro : (i + 1) * micro]
            taken = self.stage.discriminator_step(batches, generator_first=i > 0)
        self.stage.generator_step(taken)

    def tensors(self) -> list[Tensor]:
        """All that outlives a step and that a step changes."""
        return list(_changed(self.stage))


def _changed(stage: ActiveStage) -> Iterator[Tensor]:
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

    Args:
        stage: in eager mode; `unsupported_reason` is None.

    Attributes:
        form: "eager" while steps run as usual, "captured" later.
        refusal: why the steps stay eager, once that is known.
        difference: of a captured step to an eager one, once that is known.
    """

    def __init__(self, stage: ActiveStage) -> None:
        self._stage = stage
        self._static: StaticStep | None = None
        self._replay: Callable[[], None] | None = None
        self._done = 0
        self.refusal: str | None = None
        self.difference: float | None = None

    @property
    def form(self) -> str:
        return "eager" if self._replay is None else "captured"

    def step(self, batches: Sequence[Batch]) -> None:
        """One step on its micro-batches; the number of the step, rates and blend have been set."""
        if self._static is None:
            self._static = StaticStep(self._stage, batches)
        self._static.load(batches)
        if self._replay is None and self.refusal is None and self._done >= WARM_UP_STEPS:
            self._capture(self._static)  # it takes this step
        elif self._replay is None:
            self._static.run()
        else:
            self._replay()
        self._done += 1

    def _capture(self, static: StaticStep) -> None:
        """Capture the step, and do it in both ways from the same state. Reads from the device."""
        device = self._stage.world.device
        tensors = static.tensors()
        before = [x.clone() for x in tensors]

        static.run()
        expected = [x.clone() for x in tensors]
        _restore(tensors, before)
        try:
            replay = capture(static.run, device)
        except RuntimeError as error:
            _restore(tensors, expected)
            self.refusal = f"the step cannot be captured: {first_line(error)}"
            return
        _restore(tensors, before)
        replay()
        pairs = list(zip(tensors, expected, strict=True))
        floating = [(x, y) for x, y in pairs if x.is_floating_point()]
        self.difference = difference_of([x for x, _ in floating], [y for _, y in floating])
        counts_agree = all(torch.equal(x, y) for x, y in pairs if not x.is_floating_point())
        if self.difference <= TOLERANCE and counts_agree:
            self._replay = replay
        else:
            _restore(tensors, expected)
            self.refusal = f"a captured step differs from an eager one by {self.difference:.1e} of the norm"


@torch.no_grad()
def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
