"""Detects the first loss or gradient that is NaN or infinite, without device-to-host synchronization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NEVER = 2**31 - 1


class NonFiniteDetector:
    """Stores on the device, for each watched tensor, the first step at which it was not finite.

    Hooks on the parameters see the gradients, before an engine reduces, partitions or frees them.

    `watch` the networks once; in each step call `begin_step`, `loss` for each loss, and `close_step` after each
    backward; call `first_bad` when the host reads from the device anyway.

    Args:
        device: of the losses and gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._largest: list[Tensor] = []
        self._first = torch.full((0,), _NEVER, dtype=torch.int32, device=device)
        self._step = torch.zeros((), dtype=torch.int32, device=device)
        self._zero = torch.zeros((), device=device)

    def _add(self, name: str) -> int:
        self._names.append(name)
        self._largest.append(self._zero)
        never = torch.full((1,), _NEVER, dtype=torch.int32, device=self._device)
        self._first = torch.cat([self._first, never])
        return len(self._names) - 1

    def watch(self, label: str, module: nn.Module) -> None:
        """Watch the gradient of every trainable parameter of `module`, named `label`.parameter in reports."""

        def hook(index: int):  # type: ignore[no-untyped-def]
            def record(gradient: Tensor | None) -> None:
                if gradient is None:  # of a loss that does not depend on it, as a penalty alone on a bias
                    self._largest[index] = self._zero
                    return
                self._largest[index] = torch.linalg.vector_norm(gradient.detach(), ord=torch.inf, dtype=torch.float32)

            return record

        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(hook(self._add(f"gradient of {label}.{name}")))

    def gradients(self, label: str, largest: Tensor) -> None:
        """Watch gradients of this step that no hook sees: the largest magnitude in each, float32 [parameters].

        Args:
            label: as given to `watch`, whose parameters they belong to, in order.
        """
        first = next(i for i, name in enumerate(self._names) if name.startswith(f"gradient of {label}."))
        self._largest[first : first + len(largest)] = largest.unbind()

    def loss(self, name: str, value: Tensor) -> None:
        """Watch a scalar loss of this step."""
        if name not in self._names:
            self._add(name)
        self._largest[self._names.index(name)] = value.detach().float()

    def begin_step(self, step: int) -> None:
        """Set the number of the step that later calls belong to."""
        self._step.fill_(step)

    def close_step(self) -> None:
        """Update the first bad steps from the losses and gradients recorded so far."""
        if self._names:
            bad = ~torch.isfinite(torch.stack(self._largest))
            self._first = torch.minimum(self._first, torch.where(bad, self._step, _NEVER).to(torch.int32))

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
