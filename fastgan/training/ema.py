"""Exponential moving average of the generator's weights, the network that samples are drawn from."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """Average of a generator, updated once for each of its steps.

    Parameters and batch-norm statistics are averaged; other buffers (power-iteration vectors, alpha) are copied. The
    decay is a tensor on the device, so that an update does not synchronize with the host.

    Args:
        generator: copied, put in evaluation mode.
        decay: weight of the past.
        warmup: start with decay (1 + t) / (10 + t) at step t until that exceeds `decay`, so that a short run is not
            an average with its initial weights.
    """

    def __init__(self, generator: nn.Module, decay: float, warmup: bool) -> None:
        self.module = copy.deepcopy(generator).eval().requires_grad_(False)
        device = next(generator.parameters()).device
        self.decay = torch.tensor(decay, device=device)
        self.steps = torch.zeros((), device=device)
        self.warmup = warmup

    def _split(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        averaged = [p.detach() for p in module.parameters()]
        copied: list[Tensor] = []
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                statistic = name in ("running_mean", "running_var")
                (averaged if statistic else copied).append(buffer)
        return averaged, copied

    @torch.no_grad()
    def update(self, generator: nn.Module) -> None:
        decay = self.decay
        if self.warmup:
            decay = torch.minimum(decay, (1.0 + self.steps) / (10.0 + self.steps))
        self.steps += 1.0
        ours, ours_copied = self._split(self.module)
        theirs, theirs_copied = self._split(generator)
        difference = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(difference, 1.0 - decay)
        torch._foreach_add_(ours, difference)
        if ours_copied:
            torch._foreach_copy_(ours_copied, theirs_copied)
