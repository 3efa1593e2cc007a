"""New networks of a stage, and networks that grow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan import models
from fastgan.config import Config


def build_networks(config: Config, values: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """New networks, the same on every rank: drawn from (seed, resolution) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed * 4096 + values["resolution"])
        generator, discriminator = models.build(**values)
    if config.system.sync_bn:
        generator = nn.SyncBatchNorm.convert_sync_batchnorm(generator)
        discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    return generator, discriminator


def inherit(grown: nn.Module, small: dict[str, Tensor]) -> None:
    """Load the state of the smaller network into the grown one; only the new level keeps its initial weights.

    Raises:
        RuntimeError: a tensor of the smaller network has no place in the grown one.
    """
    _, unexpected = grown.load_state_dict(small, strict=False)
    if unexpected:
        raise RuntimeError(f"the grown network has no {unexpected[0]}")
