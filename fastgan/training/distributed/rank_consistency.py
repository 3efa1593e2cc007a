"""What all ranks must have in common before they train together."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

import torch

from fastgan import __version__
from fastgan.config import Config, to_dict
from fastgan.errors import ArgumentError
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.resilience.heartbeat import host


def same(world: ProcessGroup, values: dict[str, Any]) -> None:
    """Refuse a rank whose `values` (by the name that an error gives them) are not those of rank 0; a collective.

    Clocks are not compared: nothing in a run is computed from the time, and the run's name is rank 0's.

    Raises:
        ArgumentError: on rank 0, naming the host and both values; SystemExit: on the others, which have nothing to add.
    """
    gathered = world.gather((host(), values))
    first_host, first = gathered[0]
    for rank, (name, theirs) in enumerate(gathered):
        for key, ours in first.items():
            if theirs[key] != ours:
                world.done()
                if not world.main:
                    raise SystemExit(2)
                raise ArgumentError(
                    f"{key} on {name} (rank {rank})", theirs[key], f"must be {ours!r}, as on {first_host} (rank 0)"
                )


def settings(config: Config) -> dict[str, Any]:
    """What decides what is computed: versions, and every flag but those of the machine alone."""
    values: dict[str, Any] = {"fastgan's version": __version__, "torch's version": str(torch.__version__)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        values["deepspeed's version"] = importlib.metadata.version("deepspeed")
    for section, content in to_dict(config).items():
        for key, value in content.items():
            if (section, key) not in (("system", "threads"), ("data", "workers"), ("data", "resident_gb")):
                values[f"--{key.replace('_', '-')}"] = value
    return values
