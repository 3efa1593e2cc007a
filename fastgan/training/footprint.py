"""Memory and operations of a training step, counted on the meta device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgan import models
from fastgan.config import Config, replace
from fastgan.config.growth import Stage
from fastgan.data import Source
from fastgan.models.pggan import Progressive
from fastgan.planning.memory import Footprint, model_state_bytes
from fastgan.training.from_config import build_augmentation, build_step, network_values
from fastgan.training.step import Step


class _Counter(TorchDispatchMode):
    """Counts peak memory of tensors created inside, and operations of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.flops = 0
        self._live_bytes = 0
        self._storages: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._live_bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._storages:
                self._storages.add(key)
                self._live_bytes += storage.nbytes()
                weakref.finalize(storage, self._release, key, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return result


def _count_updates(step: Step, batch: int, channels: int, resolution: int) -> list[_Counter]:
    """Counts of a discriminator update and of a generator update on `batch` images, without the networks' own bytes."""
    with torch.device("meta"):
        real = torch.empty(batch, channels, resolution, resolution)
        positions = torch.arange(batch)
        labels = torch.zeros(batch, dtype=torch.int64)
    counts = []
    losses = [
        lambda: step.discriminator_loss(real, positions, labels),
        lambda: step.generator_loss(positions, real, labels),
    ]
    lazy = step.penalty is not None and step.penalty_every > 1
    if lazy:
        losses.append(lambda: step.penalty_loss(real, positions, labels))
    for run in losses:
        with _Counter() as count:
            run()[0].backward()
        counts.append(count)
        for module in (step.generator, step.discriminator):
            module.zero_grad()
    if lazy:
        penalty = counts.pop()
        counts[0].flops += penalty.flops // step.penalty_every
        counts[0].peak_bytes = max(counts[0].peak_bytes, penalty.peak_bytes)
    return counts


def _parameters(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def footprint(config: Config, source: Source, stage: Stage, micro: int, ranks: int, *, fading: bool) -> Footprint:
    """Run a step of a stage on the meta device, which computes nothing, and count it.

    All tensors are counted in float32: the meta device has no autocast, so the count is an upper bound under bf16.

    Args:
        config: configuration of the run.
        source: the images, for their channels and classes.
        stage: the stage.
        micro: images of a micro-batch.
        ranks: number of ranks, over which ZeRO divides the optimizer state.
        fading: whether the stage's resolution is being faded in.
    """
    values = network_values(
        config.networks, resolution=stage.resolution, channels=source.channels, num_classes=source.num_classes
    )
    with torch.device("meta"):
        generator, discriminator = models.build(**values)
    for module in (generator, discriminator):
        if isinstance(module, Progressive):
            module.set_alpha(0.5 if fading else 1.0)
    config = replace(config, system={"precision": "fp32"})
    augmentation = build_augmentation(config, source.channels, torch.device("meta"))
    step = build_step(config, generator, discriminator, source.num_classes, augmentation)
    update_d, update_g = _count_updates(step, micro, source.channels, stage.resolution)
    g, d = _parameters(generator), _parameters(discriminator)
    state = model_state_bytes(g, d, config.optimizer.optimizer, ranks if config.system.zero else 1)
    trained_g, trained_d = _parameters(generator, trained=True), _parameters(discriminator, trained=True)
    peak = max(update_d.peak_bytes, update_g.peak_bytes)
    if config.system.capture:  # a graph has activations of its own, and is checked beside two copies of the state
        state, peak = 3 * state, 2 * peak
    return Footprint(state + peak, g, d, trained_g, trained_d, update_g.flops, update_d.flops)
