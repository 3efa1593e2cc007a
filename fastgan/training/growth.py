"""Growing a progressive network: the next resolution starts from the weights of the one below (Karras et al. 2018)."""

from __future__ import annotations

import torch
from torch import nn


def inherit(grown: nn.Module, small: dict[str, torch.Tensor]) -> None:
    """Load the smaller network's state into the grown one; only the new level keeps its initial weights.

    Raises:
        RuntimeError: a tensor of the smaller network has no place in the grown one.
    """
    _, unexpected = grown.load_state_dict(small, strict=False)
    if unexpected:
        raise RuntimeError(f"the grown network has no {unexpected[0]}")
