"""Which implementations run where images are drawn and nothing is trained: on a CPU those of the shipped table.

A measurement takes tenths of a second for each class, times a forward and two backward passes, and would gain some
milliseconds of an image: a command that draws some never earns it back. The images of a seed then do not depend on
what was measured before. On a GPU the implementations are measured as everywhere: none runs there before it was
compared with plain PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fastgan.ops import qualification
from fastgan.ops.dispatch.backend import by_shipped_table


@contextlib.contextmanager
def drawing(device: torch.device) -> Iterator[None]:
    """Context of code that draws images on `device`; what was found to be wrong on this machine does not run."""
    if device.type != "cpu":
        yield
        return
    qualification.exclude_known(device)
    with by_shipped_table():
        yield
