"""Running means of what steps log."""

from __future__ import annotations

import torch
from torch import Tensor


class Meters:
    """Running sums of what steps log, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def totals(self, names: list[str], device: torch.device) -> Tensor:
        """Sums and counts of `names`, float32 [2, names] on `device`; zeros for what was never added."""
        zero = torch.zeros((), device=device)
        sums = torch.stack([self._sums.get(name, zero) for name in names])
        counts = torch.tensor([self._counts.get(name, 0) for name in names], dtype=torch.float32)
        return torch.stack([sums, counts.to(device)])

    def load(self, names: list[str], totals: Tensor) -> None:
        """Continue from `totals` of these names."""
        self.clear()
        sums, counts = totals
        for name, total, count in zip(names, sums, counts.tolist(), strict=True):
            if count:
                self._sums[name], self._counts[name] = total.clone(), int(count)

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()
