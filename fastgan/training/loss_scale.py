"""Dynamic loss scaling for float16, without device-to-host synchronization.

A gradient below 6e-8 is 0 in float16, and one above 65,504 is infinite. So each network's loss is multiplied by a scale
before its backward, and the gradients, which are float32, are divided by it before the optimizer uses them. An update
whose gradients overflowed changes nothing and halves the scale; 2,000 updates in a row without one double it
(Micikevicius et al. 2018, "Mixed precision training", section 3.2). The inner gradient of a penalty has the
discriminator's scale too, and is divided by it in float32 before its norm.

Whether an update counts is decided by tensors on the device: the optimizer steps in any case, and what it changed is
put back where there was an overflow. Every update that was skipped is counted, in metrics.jsonl and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_INITIAL = 2.0**13
# At this scale nothing is gained from a smaller one: an overflow is an error of the run, and stops it.
_SMALLEST = 1.0
# The largest scale whose product with a loss of 1e6 is far from float32's end.
_LARGEST = 2.0**24
_GOOD_UPDATES = 2000


class LossScale:
    """The scale of one network's loss.

    Args:
        device: of the network.

    Attributes:
        value: the scale, float32.
        good: updates without an overflow since the scale changed, int32.
        skipped: updates that were skipped since the run began, int64.
        failure: float32, 0, or infinite once an update overflowed at the smallest scale.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), _INITIAL, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.failure = torch.zeros((), device=device)
        self._overflow = torch.zeros((), dtype=torch.bool, device=device)
        self._before: list[tuple[Tensor, Tensor]] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of `optimizer` by the scale, and skip updates that overflowed.

        After whatever else changes the weights in a hook of its steps.
        """
        optimizer.register_step_pre_hook(lambda optimizer, *_: self._unscale(optimizer))
        optimizer.register_step_post_hook(lambda optimizer, *_: self._finish(optimizer))

    def _state_of(self, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
        """All that an update changes, but for step counts on the host, which no update reads."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.device == self.value.device:
                        yield value

    @torch.no_grad()
    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        largest = torch.stack(torch._foreach_norm(gradients, ord=torch.inf))
        self._overflow = ~torch.isfinite(largest).all()
        torch._foreach_mul_(gradients, 1.0 / self.value)  # exact: scales are powers of two
        self._before = [(value, value.clone()) for value in self._state_of(optimizer)]

    @torch.no_grad()
    def _finish(self, optimizer: torch.optim.Optimizer) -> None:
        overflow, before = self._overflow, {id(value): old for value, old in self._before}
        self._before = []
        for value in self._state_of(optimizer):
            # What the optimizer made in this update, its first, was zeros before.
            value.copy_(torch.where(overflow, before.get(id(value), torch.zeros_like(value)), value))
        self.failure.copy_(torch.where(overflow & (self.value <= _SMALLEST), torch.inf, self.failure))
        self.skipped += overflow
        self.good.copy_(torch.where(overflow, 0, self.good + 1))
        doubles = self.good >= _GOOD_UPDATES
        self.good.copy_(torch.where(doubles, 0, self.good))
        factor = torch.where(overflow, 0.5, torch.where(doubles, 2.0, 1.0))
        self.value.copy_((self.value * factor).clamp(_SMALLEST, _LARGEST))


class LossScales:
    """The scales of both networks of a run in float16, over all its stages.

    Attributes:
        generator, discriminator: the scales.
    """

    def __init__(self, device: torch.device) -> None:
        self.generator, self.discriminator = LossScale(device), LossScale(device)
        self._last: dict[str, Tensor] = {}

    def of(self, name: str) -> LossScale:
        """The scale of "generator" or "discriminator"."""
        return self.generator if name == "generator" else self.discriminator

    def finite(self, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a step logs, with the last finite value in place of one that is not, as in a step that is skipped."""
        for name, value in seen.items():
            last = self._last.setdefault(name, torch.zeros_like(value))
            last.copy_(torch.where(torch.isfinite(value), value, last))
        return {name: self._last[name] for name in seen}

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        scales = (self.generator, self.discriminator)
        return [t for it in scales for t in (it.value, it.good, it.skipped, it.failure)] + list(self._last.values())

    def state(self) -> dict[str, Tensor]:
        """The tensors of both scales, by "network/quantity", for checkpoints and other ranks; not copies."""
        scales = {"generator": self.generator, "discriminator": self.discriminator}
        quantities = ("value", "good", "skipped")
        return {f"{name}/{key}": getattr(scale, key) for name, scale in scales.items() for key in quantities}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore `state`; what it lacks, as that of a run in another precision, keeps its value."""
        for name, tensor in self.state().items():
            if name in state:
                tensor.copy_(state[name])

    def row(self) -> dict[str, float]:
        """What metrics.jsonl has of them; reads from the device."""
        return {
            "loss_scale_g": self.generator.value.item(),
            "loss_scale_d": self.discriminator.value.item(),
            "skipped_g": self.generator.skipped.item(),
            "skipped_d": self.discriminator.skipped.item(),
        }
