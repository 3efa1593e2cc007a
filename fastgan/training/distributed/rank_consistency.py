"""Consistency checks: what must be equal on all ranks."""

from __future__ import annotations

import socket
from typing import Any

from fastgan.config import Config, to_dict
from fastgan.errors import ArgumentError
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.observability.rank_log import versions


def require_same_on_all_ranks(world: ProcessGroup, values: dict[str, Any]) -> None:
    """Refuse to continue if a rank's `values` differ from rank 0's; a collective.

    Clocks are not compared: nothing in a run is computed from the time, and rank 0 names the run.

    Args:
        world: the ranks.
        values: what must be equal, by the name to print; the same keys on every rank.

    Raises:
        ArgumentError: on rank 0; names the host and both values.
        SystemExit: on the other ranks, silently.
    """
    gathered = world.gather((socket.gethostname(), values))
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


def shared_settings(config: Config) -> dict[str, Any]:
    """What decides the result and so must be equal on all ranks: versions, and all flags but those of one machine."""
    values: dict[str, Any] = {f"{package}'s version": version for package, version in versions().items()}
    deepspeed = values.pop("deepspeed's version")
    for section, content in to_dict(config).items():
        for key, value in content.items():
            if (section, key) not in (("system", "threads"), ("data", "workers"), ("data", "resident_gb")):
                values[f"--{key.replace('_', '-')}"] = value
    if config.system.engine != "torch":  # last: a difference in --engine is reported first
        values["deepspeed's version"] = deepspeed
    return values
