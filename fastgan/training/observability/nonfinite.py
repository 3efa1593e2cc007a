"""Detects the first loss or gradient that is NaN or infinite, without device-to-host synchronization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NEVER = 2**31 - 1


class NonFiniteDetector:
    """Stores on the device, for each watched tensor, the first step at which it was not finite.

    `watch` the networks once; in each step call `begin_step`, and for each micro-batch, after its backward, `loss` and,
    unless hooks see them, `gradients`, then `close_step`; call `first_bad` when the host reads from the device anyway.

    What it keeps from step to step are the same tensors, changed in place.

    Args:
        device: of the losses and gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._watched: dict[str, tuple[int, list[nn.Parameter]]] = {}
        self._first = torch.full((0,), _NEVER, dtype=torch.int32, device=device)
        self._step = torch.zeros((), dtype=torch.int32, device=device)
        self._never = torch.full((), _NEVER, dtype=torch.int32, device=device)
        self._zero = torch.zeros((), device=device)
        self._largest: list[Tensor] = []

    def _add(self, name: str) -> int:
        self._names.append(name)
        self._largest.append(self._zero)
        self._first = torch.cat([self._first, self._never[None]])
        return len(self._names) - 1

    def watch(self, label: str, module: nn.Module, *, hooks: bool = True) -> None:
        """Watch the gradient of every trainable parameter of `module`, named `label`.parameter in reports.

        Args:
            hooks: see the gradients as they arrive, for an engine that reduces, partitions or frees them in its
                backward. Otherwise `gradients` reads all of them at once.
        """

        def hook(index: int):  # type: ignore[no-untyped-def]
            def record(gradient: Tensor | None) -> None:
                if gradient is None:  # of a loss that does not depend on it, as a penalty alone on a bias
                    self._largest[index] = self._zero
                    return
                self._largest[index] = torch.linalg.vector_norm(gradient.detach(), ord=torch.inf, dtype=torch.float32)

            return record

        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        indices = [self._add(f"gradient of {label}.{name}") for name, _ in trained]
        for index, (_, parameter) in zip(indices, trained, strict=True):
            if hooks:
                parameter.register_hook(hook(index))
        if indices:
            self._watched[label] = indices[0], [] if hooks else [p for _, p in trained]

    def gradients(self, label: str, largest: Tensor | None = None) -> None:
        """Watch the gradients of a network after a backward, where no hook sees them.

        Args:
            label: as given to `watch`.
            largest: the largest magnitude in each, float32 [parameters], in order; None: those that are in `.grad`.
        """
        if label not in self._watched:
            return
        start, parameters = self._watched[label]
        if largest is not None:
            self._largest[start : start + len(largest)] = largest.unbind()
            return
        there = [(i, p.grad.detach()) for i, p in enumerate(parameters, start) if p.grad is not None]
        if there:
            norms = torch._foreach_norm([gradient for _, gradient in there], ord=torch.inf, dtype=torch.float32)
            for (index, _), norm in zip(there, norms, strict=True):
                self._largest[index] = norm

    def loss(self, name: str, value: Tensor) -> None:
        """Watch a scalar loss of this step."""
        if name not in self._names:
            self._add(name)
        self._largest[self._names.index(name)] = value.detach().float()

    def begin_step(self, step: int) -> None:
        """Set the number of the step that later calls belong to."""
        self._step.fill_(step)

    @torch.no_grad()
    def close_step(self) -> None:
        """Update the first bad steps from the losses and gradients recorded since the last call."""
        if self._names:
            finite = torch.stack(self._largest).abs() < torch.inf  # false for a NaN
            torch.minimum(self._first, torch.where(finite, self._never, self._step), out=self._first)
            self.discard_step()

    def discard_step(self) -> None:
        """Forget what was recorded since the last `close_step`."""
        self._largest = [self._zero] * len(self._names)

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return [self._first]

    def pending(self) -> Tensor:
        """First bad step of every watched tensor, int32 [names]; ranks combine theirs by the minimum."""
        return self._first

    def first_bad(self, first: Tensor) -> tuple[int, str] | None:
        """The first tensor that was not finite; reads from the device.

        Args:
            first: of `pending`, combined over ranks.

        Returns:
            (step, name), or None if all were finite. In one step losses come before gradients: they are closer to the
            cause.
        """
        steps = first.tolist()
        bad = [(step, name.startswith("gradient"), name) for step, name in zip(steps, self._names, strict=True)]
        step, _, name = min(bad, default=(_NEVER, False, ""))
        return None if step == _NEVER else (step, name)
