"""Running means of what steps log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Meters:
    """Running sums and counts of what steps log, kept on the device until they are read.

    They are the same tensors from step to step, changed in place, so that a recorded step goes on counting.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def _require(self, names: Sequence[str], device: torch.device) -> None:
        for name in names:
            if name not in self._sums or self._sums[name].device != device:
                self._sums[name], self._counts[name] = (torch.zeros((), device=device) for _ in range(2))

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        if not values:
            return
        self._require(list(values), next(iter(values.values())).device)
        torch._foreach_add_([self._sums[name] for name in values], [value.detach() for value in values.values()])
        torch._foreach_add_([self._counts[name] for name in values], 1.0)

    def totals(self, names: list[str], device: torch.device) -> Tensor:
        """Sums and counts of `names`, float32 [2, names] on `device`; zeros for what was never added."""
        self._require(names, device)
        tensors = [kept[name] for kept in (self._sums, self._counts) for name in names]
        return torch.stack(tensors).view(2, len(names))

    def load(self, names: list[str], totals: Tensor) -> None:
        """Continue from `totals` of these names."""
        self.clear()
        self._require(names, totals.device)
        for kept, values in zip((self._sums, self._counts), totals, strict=True):
            for name, value in zip(names, values, strict=True):
                kept[name].copy_(value)

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return [*self._sums.values(), *self._counts.values()]

    def clear(self) -> None:
        if self._sums:
            torch._foreach_zero_(self.tensors())
