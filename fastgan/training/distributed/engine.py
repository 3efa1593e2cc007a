"""What owns a network and its optimizer: the protocol that the trainer uses, and what both engines share.

Parameters and optimizer state are float32 in every engine. An engine gives its optimizer state by parameter name and
quantity, so that a checkpoint depends neither on the engine, nor on the ZeRO stage, nor on the number of ranks.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan.training.distributed.gradient_reducer import GradientReducer
from fastgan.utils.timers import Stopwatch

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Engine(Protocol):
    """One network and its optimizer.

    The trainer calls `backward` or `accumulate` and then `step` for every micro-batch. The last micro-batch of an
    accumulation updates the weights. The update may be deferred until `module` is next called or until `wait`, so that
    ranks do not wait for each other's gradients before they need them.

    Attributes:
        module: the network.
        memory_format: memory format of its convolution weights.
    """

    module: nn.Module
    memory_format: torch.memory_format

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss."""

    def accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of a micro-batch that were computed elsewhere, one for each trainable parameter.

        They are already divided by the number of micro-batches, and have the strides of their parameters. Not under
        ZeRO 1 and 2.
        """

    def step(self) -> None:
        """Finish the micro-batch; the last one of an accumulation updates the weights."""

    def wait(self) -> None:
        """Do a deferred update now. Call it before anything but `module` itself reads the weights."""

    def discard_step(self) -> None:
        """Forget the micro-batches of an update that was not finished."""

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next updates."""

    def state(self) -> dict[str, Tensor]:
        """Optimizer state on the CPU, by "parameter/quantity". A collective: every rank must call it."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` of this or another engine returned."""

    def close(self) -> None:
        """Release what the engine holds; a deferred update is dropped."""


class BaseEngine(abc.ABC):
    """Accumulation, gradient reduction and the deferred update: the part of an engine that both engines share.

    A subclass implements `_backward` and `_update`, and calls `_reduce_gradients` if `GradientReducer` is to average
    its gradients.

    Args:
        module: the network, on its device and in its memory format.
        optimizer: the torch optimizer that updates it.
        accumulation: micro-batches of an update.
        memory_format: see `Engine`.
        on_update: called after every update of the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
        memory_format: torch.memory_format,
        on_update: Callable[[], None] | None,
    ) -> None:
        self.module, self.memory_format = module, memory_format
        self._optimizer, self._accumulation, self._on_update = optimizer, accumulation, on_update
        self._micro_batches = 0
        self._reducer: GradientReducer | None = None
        self._update_pending = False

    @abc.abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` / accumulation."""

    @abc.abstractmethod
    def _update(self, last: bool) -> None:
        """Finish a micro-batch; update the weights if it is the last one."""

    def _reduce_gradients(self, waiting: Stopwatch, group: Any) -> None:
        """Average gradients over `group`, if this rank is in it, and defer each update to the weights' next use."""
        if dist.get_rank(group) >= 0:
            self._reducer = GradientReducer(self.module, waiting, group)
            self.module.register_forward_pre_hook(lambda *_: self.wait())

    def _is_last_micro_batch(self) -> bool:
        return (self._micro_batches + 1) % self._accumulation == 0

    def backward(self, loss: Tensor) -> None:
        reducer = self._reducer if self._is_last_micro_batch() else None
        if reducer is not None:
            reducer.expect()
        self._backward(loss)
        if reducer is not None:
            reducer.flush()

    def accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        reducer = self._reducer if self._is_last_micro_batch() else None
        if reducer is not None:
            reducer.expect()
        for (_, p), gradient in zip(trainable_parameters(self.module), gradients, strict=True):
            if gradient is not None:
                assert gradient.stride() == p.stride()  # fused optimizers do not look
                p.grad = gradient if p.grad is None else p.grad + gradient
        if reducer is not None:
            reducer.flush()

    def step(self) -> None:
        last = self._is_last_micro_batch()
        self._micro_batches += 1
        if last and self._reducer is not None:
            self._update_pending = True
        else:
            self._finish(last)

    def wait(self) -> None:
        if self._update_pending:
            assert self._reducer is not None
            self._update_pending = False
            self._reducer.finish()
            self._finish(last=True)

    def discard_step(self) -> None:
        """Forget the micro-batches of an update that was not finished."""
        self._optimizer.zero_grad(set_to_none=True)
        self._micro_batches -= self._micro_batches % self._accumulation

    def _finish(self, last: bool) -> None:
        self._update(last)
        if last and self._on_update is not None:
            self._on_update()

    def set_rate(self, rate: float) -> None:
        self.wait()  # the deferred update uses the previous rate
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # of a captured step, which reads it where it is
            else:
                group["lr"] = rate

    def _fragments(self) -> list[Fragment]:
        """The optimizer state of this rank: all of it, unless a subclass partitions it."""
        return [Fragment(name, p, p, 0, 0, p.numel()) for name, p in trainable_parameters(self.module)]

    def state(self) -> dict[str, Tensor]:
        return collect_optimizer_state(self.module, self._fragments(), self._optimizer, partitioned=False)

    def load_state(self, state: dict[str, Tensor]) -> None:
        restore_optimizer_state(self._fragments(), self._optimizer, state)

    def close(self) -> None:
        self._update_pending = False
        if self._reducer is not None:
            self._reducer.close()


def trainable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all parameters that require a gradient."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


class Fragment(NamedTuple):
    """A part of a parameter whose optimizer state is on this rank.

    `holder[start : start + numel]` of the flattened tensor that the optimizer updates is `parameter[offset : offset +
    numel]` of the flattened parameter `name`. Without ZeRO a parameter is its own holder.
    """

    name: str
    parameter: nn.Parameter
    holder: Tensor
    start: int
    offset: int
    numel: int


def collect_optimizer_state(
    module: nn.Module, fragments: list[Fragment], optimizer: torch.optim.Optimizer, partitioned: bool
) -> dict[str, Tensor]:
    """Optimizer state of whole parameters on the CPU, by "parameter/quantity".

    Args:
        module: the network.
        fragments: the parts on this rank.
        optimizer: their optimizer.
        partitioned: whether each rank has only a part of the state. Then this is a collective of all ranks.
    """
    # Every rank must run the same collectives in the same order, so the ranks first exchange the quantities' names.
    quantities: dict[str, bool] = {}
    for fragment in fragments:
        for key in optimizer.state.get(fragment.holder, {}):
            quantities[key] = key != "step"  # the only quantity with one value for each parameter, not for each weight
    if partitioned:
        gathered: list[dict[str, bool] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, quantities)
        quantities = {key: value for part in gathered if part for key, value in part.items()}
    by_name: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        by_name.setdefault(fragment.name, []).append(fragment)
    state: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(module):
        for key in sorted(quantities):
            flat = torch.zeros(parameter.numel() if quantities[key] else 1, device=parameter.device)
            holders = torch.zeros(1, device=parameter.device)
            for fragment in by_name.get(name, []):
                value = optimizer.state.get(fragment.holder, {}).get(key)
                if value is None:
                    continue
                holders += 1
                if quantities[key]:
                    piece = value.flatten()[fragment.start : fragment.start + fragment.numel]
                    flat[fragment.offset : fragment.offset + fragment.numel] = piece
                else:
                    flat[0] = value
            if partitioned:
                dist.all_reduce(flat)
                dist.all_reduce(holders)
            if holders.item() == 0:
                continue
            if not quantities[key]:
                flat = flat / holders  # the step count, which is the same on every holder
            state[f"{name}/{key}"] = (flat.view_as(parameter) if quantities[key] else flat[0]).clone().cpu()
    return state


def restore_optimizer_state(
    fragments: list[Fragment], optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Load what `collect_optimizer_state` returned into the parts on this rank."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, quantity = key.rsplit("/", 1)
        by_name.setdefault(name, {})[quantity] = value
    for fragment in fragments:
        current = optimizer.state[fragment.holder]
        for quantity, value in by_name.get(fragment.name, {}).items():
            if quantity == "step":
                # Fused optimizers keep the step count on the parameter's device, others on the CPU.
                fused = optimizer.param_groups[0].get("fused")
                current[quantity] = value.clone().to(fragment.holder.device if fused else "cpu")
                continue
            if quantity not in current:
                current[quantity] = torch.zeros_like(fragment.holder)
            if fragment.numel == fragment.holder.numel() and fragment.holder.shape == value.shape:
                current[quantity].copy_(value)  # keeps the holder's memory format, which a flattened copy would not
            else:
                piece = value.to(fragment.holder.device).flatten()[fragment.offset : fragment.offset + fragment.numel]
                current[quantity].view(-1)[fragment.start : fragment.start + fragment.numel] = piece
