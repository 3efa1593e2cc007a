"""`--init-from`: a new run that starts from the weights of another one, or of an exported generator, on any data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgan import checkpoint, trained
from fastgan.config import Config
from fastgan.data import Source
from fastgan.errors import ArgumentError
from fastgan.export import formats
from fastgan.models import misfit
from fastgan.training.checkpoints.resume import require_fitting
from fastgan.training.from_config import network_values
from fastgan.utils.text import first_line

FLAG = "--init-from"


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a new run starts from.

    Attributes:
        name: what they are of, for messages.
        networks: arguments of `fastgan.models.build`.
        variant: of the run that they are from.
        state: state dicts by network: "generator", "ema" and, unless the file has a generator alone, "discriminator".
    """

    name: str
    networks: dict[str, Any]
    variant: str
    state: dict[str, dict[str, Tensor]]

    @property
    def note(self) -> str | None:
        """Line for the log if the discriminator is new."""
        if "discriminator" in self.state:
            return None
        return f"--init-from: {self.name} has a generator alone; the discriminator starts from new weights"


def read_meta(path: str) -> dict[str, Any]:
    """The plain values of the run or the exported file that --init-from names; has "networks" and "variant".

    Raises:
        ArgumentError: it cannot be read, or does not say of which variant it is.
    """
    file = _exported_file(path)
    if file is None:
        stored = _checkpoint(path)
        stored.require("networks", "variant")
        return stored.meta
    try:
        meta = formats.read_meta(file)
    except ArgumentError as error:
        raise error.renamed(FLAG) from None
    if "variant" not in meta:
        raise ArgumentError(FLAG, path, "must name its variant in its metadata, as files of fastgan export do")
    return meta


def _exported_file(path: str) -> Path | None:
    """The .safetensors export that `path` names, or None for a run.

    Raises:
        ArgumentError: there is no such path, or it is an export without weights to train.
    """
    try:
        resolved = trained.resolve(Path(path).expanduser(), FLAG)
        file = formats.find_export(resolved)
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that does not exist
        problem = f"must be a run that can be read ({first_line(error)})"
        raise ArgumentError(FLAG, path, problem) from None
    except ArgumentError as error:
        raise trained.hint(error.renamed(FLAG)) from None
    if file is not None and file.suffix != ".safetensors":
        raise ArgumentError(FLAG, path, "must be a run, a checkpoint or a .safetensors export")
    return file


def _checkpoint(path: str) -> checkpoint.Checkpoint:
    try:
        return checkpoint.read_named(path, FLAG)
    except ArgumentError as error:
        raise trained.hint(error) from None


def _read(path: str) -> InitialWeights:
    """The weights at `path`, compared with the networks they are said to be of."""
    file = _exported_file(path)
    if file is None:
        stored = _checkpoint(path)
        stored.require("networks", "variant")
        groups = require_fitting(stored)
        state = {name: groups[name] for name in ("generator", "discriminator", "ema")}
        if "augmentation" in groups:
            state["augmentation"] = groups["augmentation"]
        return InitialWeights(str(stored.path), stored.meta["networks"], stored.meta["variant"], state)
    meta = read_meta(path)
    generator = _weights(file, meta, discriminator=False)
    state = {"generator": generator, "ema": generator}
    critic = trained.discriminator_of(file)
    if critic is not None:
        state["discriminator"] = _weights(critic, meta, discriminator=True)
    return InitialWeights(str(file), meta["networks"], meta["variant"], state)


def _weights(file: Path, meta: dict[str, Any], *, discriminator: bool) -> dict[str, Tensor]:
    try:
        weights = formats.read_weights(file)
    except ArgumentError as error:
        raise error.renamed(FLAG) from None
    problem = misfit(meta["networks"], weights, discriminator=discriminator)
    if problem:
        raise ArgumentError(FLAG, str(file), f"it does not fit: {problem}")
    return weights


def initial_weights(config: Config, source: Source) -> InitialWeights | None:
    """The weights that a new run starts from, if --init-from is given.

    Args:
        config: of the new run.
        source: its images.

    Raises:
        ArgumentError: the weights cannot be read, or their networks are not those of the run.
    """
    if config.run.init_from is None:
        return None
    found = _read(config.run.init_from)
    first = config.schedule.resolution
    if config.networks.model == "pggan":
        first = config.schedule.first_resolution or 4
    own = network_values(config.networks, resolution=first, channels=source.channels, num_classes=source.num_classes)
    for key, value in found.networks.items():
        if own.get(key) != value:
            raise _difference(key, own.get(key), value, config, found)
    return found


def _difference(key: str, own: object, value: object, config: Config, found: InitialWeights) -> ArgumentError:
    """The error for networks that differ from those of the weights."""
    weights = f"the weights of {found.name}"
    if key == "num_classes":
        return ArgumentError("--data", config.data.data, f"its classes are {own}, and those of {weights} {value}")
    if key == "resolution" and config.networks.model == "pggan":
        key = "first_resolution"
    return ArgumentError(f"--{key.replace('_', '-')}", own, f"must be {value!r}; {weights} have it")
