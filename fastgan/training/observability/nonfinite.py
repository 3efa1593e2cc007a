"""Notices the first loss or gradient that is not finite, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NEVER = 2**31 - 1


class NonFiniteDetector:
    """Remembers on the device, for each watched tensor, the first step at which it was not finite.

    Gradients are seen by hooks on the parameters, before any engine reduces, partitions or frees them.

    Usage: `watch` the networks, `loss` each loss, `close_step` after each backward, `first_bad` when reading is due.
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
            def record(gradient: Tensor) -> None:
                self._largest[index] = torch.linalg.vector_norm(gradient.detach(), ord=torch.inf, dtype=torch.float32)

            return record

        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(hook(self._add(f"gradient of {label}.{name}")))

    def loss(self, name: str, value: Tensor) -> None:
        """Watch a scalar loss of this step."""
        if name not in self._names:
            self._add(name)
        self._largest[self._names.index(name)] = value.detach().float()

    def begin_step(self, step: int) -> None:
        self._step.fill_(step)

    def close_step(self) -> None:
        """Fold what this step's backward recorded into the memory; what was not recorded again counts as finite."""
        if self._names:
            bad = ~torch.isfinite(torch.stack(self._largest))
            self._first = torch.minimum(self._first, torch.where(bad, self._step, _NEVER).to(torch.int32))

    def pending(self) -> Tensor:
        """First bad step of every watched tensor, int32 [names]: to be reduced over ranks by minimum."""
        return self._first

    def first_bad(self, first: Tensor) -> tuple[int, str] | None:
        """(step, name) of the earliest tensor that was not finite, or None. Reads from the device.

        Among tensors that went bad in the same step, losses come before gradients: they are nearer to the cause.
        """
        steps = first.tolist()
        bad = [(step, name.startswith("gradient"), name) for step, name in zip(steps, self._names, strict=True)]
        step, _, name = min(bad, default=(_NEVER, False, ""))
        return None if step == _NEVER else (step, name)
