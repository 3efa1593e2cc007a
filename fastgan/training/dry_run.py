"""What a run would do, without doing it: `--dry-run`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgan import models
from fastgan.config import Config, active_ranks, batch_at, replace
from fastgan.config.stages import Stage
from fastgan.data import Source
from fastgan.models.pggan import Progressive
from fastgan.training.factory import build_step, network_values
from fastgan.training.step import Step

_STATE_COPIES = {"adam": 2, "rmsprop": 1, "sgd": 1}


class _Count(TorchDispatchMode):
    """Peak of the bytes alive in tensors made inside, and the operations of products and convolutions.

    Counted on the meta device, where nothing is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

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
            if key not in self._known:
                self._known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Footprint:
    """What one rank holds and computes in a step of a stage.

    Attributes:
        bytes: parameters, gradients, optimizer state, moving average, and the peak of what a step keeps, in float32.
        g, d: parameters of the generator and the discriminator; trained_g, trained_d: those that have gradients.
        flops_g, flops_d: floating-point operations of products and convolutions in one step of each, in all orders.
    """

    bytes: float
    g: int
    d: int
    trained_g: int
    trained_d: int
    flops_g: int
    flops_d: int


def _step_counts(step: Step, batch: int, channels: int, resolution: int) -> list[tuple[int, int]]:
    """(peak bytes beyond the networks, flops) of a discriminator step and of a generator step on `batch` images."""
    with torch.device("meta"):
        real = torch.empty(batch, channels, resolution, resolution)
        positions = torch.arange(batch)
        labels = torch.zeros(batch, dtype=torch.int64)
    counts = []
    for run in (lambda: step.discriminator_loss(real, positions, labels), lambda: step.generator_loss(positions)):
        with _Count() as count:
            run()[0].backward()
        counts.append((count.peak, count.flops))
        for module in (step.generator, step.discriminator):
            module.zero_grad()
    return counts


def footprint(config: Config, source: Source, stage: Stage, micro: int, world: int, *, fading: bool) -> Footprint:
    """Counted by running a step on `micro` images without storage, where nothing is computed."""
    values = network_values(
        config.networks, resolution=stage.resolution, channels=source.channels, num_classes=source.num_classes
    )
    with torch.device("meta"):
        generator, discriminator = models.build(**values)
    for module in (generator, discriminator):
        if isinstance(module, Progressive):
            module.set_alpha(0.5 if fading else 1.0)
    # Without storage there is no autocast: under bf16 the count is an upper bound.
    full = replace(config, system={"precision": "fp32", "penalty_precision": "fp32"})
    step = build_step(full, generator, discriminator, source.num_classes)
    (bytes_d, flops_d), (bytes_g, flops_g) = _step_counts(step, micro, source.channels, stage.resolution)
    g, d = _parameters(generator), _parameters(discriminator)
    shards = world if config.system.zero else 1
    held = (2 * (g + d) + g + _STATE_COPIES[config.optimizer.optimizer] * (g + d) / shards) * 4
    trained_g, trained_d = (
        sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (generator, discriminator)
    )
    return Footprint(held + max(bytes_d, bytes_g), g, d, trained_g, trained_d, flops_g, flops_d)


def describe(variant: str, preset: str, config: Config, world: int) -> str:
    """The plan of a run as text: networks, objective, stages with batch and memory for each rank.

    Memory is counted by running a step on tensors without storage: parameters, gradients, optimizer state, the moving
    average, and the peak of what a step keeps, all in float32; workspaces of convolution libraries come on top.

    Raises:
        ArgumentError: a batch that does not divide.
    """
    from fastgan.data import open_source

    check_stages(config, world)
    source = open_source(config.data.data, config.schedule.resolution, config.data.channels, config.run.seed)
    o, objective, s = config.optimizer, config.objective, config.schedule
    decay = f", falling to 0 over the last {o.lr_decay * s.kimg:g} kimg" if o.lr_decay else ""
    lines = [
        f"{variant}, {preset} preset: {s.kimg:g} kimg of {source.name} ({len(source):,} images) to {s.resolution} px",
        f"objective: {objective.loss}, regularizer {objective.regularizer}"
        + (f", drift {objective.drift:g}" if objective.drift else ""),
        f"optimizer: {o.optimizer}, lr {o.lr_g:g} (G) {o.lr_d:g} (D){decay}, {o.n_critic} D steps for each G step, "
        f"EMA {o.ema_decay:g}",
        f"machine: {world} rank{'s' if world > 1 else ''}, ZeRO {config.system.zero}, {config.system.precision}",
        "",
        f"{'px':>5} {'from kimg':>10} {'fade until':>10} {'to kimg':>8} {'batch':>6} {'ranks':>6} {'per rank':>9} "
        f"{'G params':>11} {'D params':>11} {'memory/rank':>12}",
    ]
    for stage in plan(config):
        batch = batch_at(s, stage.resolution)
        working = active_ranks(batch, world, s.accumulation) or world
        micro = batch // (working * s.accumulation)
        of = footprint(config, source, stage, micro, world, fading=stage.fade_end > stage.start)
        lines.append(
            f"{stage.resolution:5d} {stage.start / 1000:10g} {stage.fade_end / 1000:10g} {stage.end / 1000:8g} "
            f"{batch:6d} {working:6d} {micro:9d} {of.g:11,d} {of.d:11,d} {of.bytes / 2**30:8.2f} GiB"
        )
    warning = ends_early(config)
    if warning is not None:
        lines.append(warning)
    return "\n".join(lines)
