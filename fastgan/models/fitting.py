"""Whether weights that may come from others fit a network, found out without memory for the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastgan.utils.text import first_line


def difference(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> str:
    """The first weight that a network does not have or that has another shape; "" if all fit. Allocates nothing.

    Args:
        build: makes the network on torch's default device.
        weights: what would be its state dict.
    """
    try:
        with torch.device("meta"):
            network = build()
    except (TypeError, ValueError, RuntimeError, AssertionError, OverflowError, MemoryError) as error:
        return f"networks cannot be built: {first_line(error)}"
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        shape = list(weights[name].shape) if name in weights else None
        if shape != expected.get(name):
            return f"weight {name[:60]!r} has shape {shape}, its network needs {expected.get(name)}"
    return ""
