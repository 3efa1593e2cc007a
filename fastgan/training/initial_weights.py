"""`--init-from`: a new run that starts from the weights of another one, on any data."""

from __future__ import annotations

from fastgan import checkpoint
from fastgan.checkpoint import Checkpoint
from fastgan.config import Config
from fastgan.data import Source
from fastgan.errors import ArgumentError
from fastgan.training.checkpoints.resume import require_fitting
from fastgan.training.from_config import network_values

FLAG = "--init-from"


def initial_weights(config: Config, source: Source) -> Checkpoint | None:
    """The checkpoint whose weights a new run starts from, if there is one.

    Args:
        config: of the new run.
        source: its images.

    Raises:
        ArgumentError: the checkpoint cannot be read, or its networks are not those of the run.
    """
    if config.run.init_from is None:
        return None
    stored = checkpoint.read_named(config.run.init_from, FLAG)
    stored.require("networks", "variant")
    first = config.schedule.resolution
    if config.networks.model == "pggan":
        first = config.schedule.first_resolution or 4
    own = network_values(config.networks, resolution=first, channels=source.channels, num_classes=source.num_classes)
    for key, value in stored.meta["networks"].items():
        if own.get(key) != value:
            raise _difference(key, own.get(key), value, config, stored)
    require_fitting(stored)
    return stored


def _difference(key: str, own: object, value: object, config: Config, stored: Checkpoint) -> ArgumentError:
    """The error for networks that differ from those of the weights."""
    weights = f"the weights of {stored.path}"
    if key == "num_classes":
        return ArgumentError("--data", config.data.data, f"its classes are {own}, and those of {weights} {value}")
    if key == "resolution" and config.networks.model == "pggan":
        key = "first_resolution"
    return ArgumentError(f"--{key.replace('_', '-')}", own, f"must be {value!r}; {weights} have it")
