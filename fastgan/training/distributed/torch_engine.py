"""The engine without DeepSpeed: one process, or several under any launcher that sets RANK and WORLD_SIZE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.training.distributed.engine import BaseEngine, OptimizerFactory, trainable_parameters
from fastgan.training.distributed.process_group import broadcast_tensors
from fastgan.utils.timers import Stopwatch


class TorchEngine(BaseEngine):
    """Plain torch; every rank holds the whole network and its optimizer state, as under ZeRO 0.

    Args:
        module: the network; moved to `memory_format`. With several ranks all start from rank 0's parameters.
        optimizer: makes the optimizer of its trainable parameters.
        accumulation: micro-batches of an update.
        memory_format: memory format of convolution weights.
        on_update: called after every update of the weights.
        waiting: runs while this rank waits for others; None: a process that trains alone.
        group: ranks whose gradients are averaged; None: all. A rank outside the group keeps the engine and calls
            neither `backward` nor `step`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerFactory,
        accumulation: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        on_update: Callable[[], None] | None = None,
        waiting: Stopwatch | None = None,
        group: Any = None,
    ) -> None:
        if waiting is not None:
            broadcast_tensors(p.detach() for p in module.parameters())
        module = module.to(memory_format=memory_format)
        self._parameters = [p for _, p in trainable_parameters(module)]
        super().__init__(module, optimizer(self._parameters), accumulation, memory_format, on_update)
        if waiting is not None:
            self._reduce_gradients(waiting, group)

    def _backward(self, loss: Tensor) -> None:
        (loss / self._accumulation if self._accumulation > 1 else loss).backward()

    def _update(self, last: bool) -> None:
        if last:
            for p in self._parameters:
                if p.grad is None:
                    # As DeepSpeed does: a parameter without a gradient decays alike in both engines.
                    p.grad = torch.zeros_like(p)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
