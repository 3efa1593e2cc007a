"""Record of measured step times: its JSON file, and interpolation between micro-batch sizes."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, TypeAdapter, ValidationError

from fastgan.config import Config, to_dict
from fastgan.errors import ArgumentError
from fastgan.planning.cost_model import UpdateTime
from fastgan.utils.files import write_atomic
from fastgan.utils.old_names import current_names

SCHEMA = 1


@dataclass(frozen=True)
class Timing:
    """One measured step of one rank.

    Attributes:
        resolution: px.
        micro: images of the micro-batch.
        fading: whether the newest resolution is being faded in.
        d, g: the discriminator's and the generator's update.
    """

    resolution: PositiveInt
    micro: PositiveInt
    fading: bool
    d: UpdateTime
    g: UpdateTime


@dataclass(frozen=True)
class StepTimes:
    """Step times of one configuration on one device.

    Attributes:
        schema: version of the file format.
        device: name of the device.
        torch: version of torch.
        recipe: the settings that affect the time of a step, other than resolution and batch.
        timings: one entry for each measured step.
    """

    schema: int
    device: str
    torch: str
    recipe: dict[str, Any]
    timings: list[Timing]

    def at(self, resolution: int, micro: int, fading: bool) -> tuple[Timing, str] | None:
        """Time of a step on `micro` images.

        Between two measured micro-batches the time is interpolated linearly. Outside them it is extrapolated from the
        nearest two.

        Returns:
            The timing and how it was derived ("" if measured), or None if no step of this kind was measured.
        """
        known = sorted(
            (t for t in self.timings if t.resolution == resolution and t.fading == fading), key=lambda t: t.micro
        )
        if not known:
            return None
        exact = next((t for t in known if t.micro == micro), None)
        if exact is not None:
            return exact, ""
        if len(known) == 1:
            factor = micro / known[0].micro
            d, g = known[0].d.scaled(factor), known[0].g.scaled(factor)
            return Timing(resolution, micro, fading, d, g), f"scaled from a micro-batch of {known[0].micro}"
        upper = next((i for i, t in enumerate(known) if t.micro > micro), len(known) - 1)
        low, high = known[max(upper, 1) - 1], known[max(upper, 1)]
        weight = (micro - low.micro) / (high.micro - low.micro)
        d, g = (_interpolated(a, b, weight) for a, b in ((low.d, high.d), (low.g, high.g)))
        return Timing(resolution, micro, fading, d, g), f"linear through micro-batches of {low.micro} and {high.micro}"


def _interpolated(a: UpdateTime, b: UpdateTime, weight: float) -> UpdateTime:
    """Duration at `weight` between a and b, with the gradient schedule of the nearer one."""
    seconds = max(a.seconds + weight * (b.seconds - a.seconds), 0.0)
    nearer = a if weight < 0.5 else b
    return nearer.scaled(seconds / nearer.seconds) if nearer.seconds else nearer


def recipe_of(config: Config, channels: int) -> dict[str, Any]:
    """The settings that affect the time of a step, other than resolution and batch."""
    system = config.system
    return {
        **to_dict(config)["networks"],
        "loss": config.objective.loss,
        "regularizer": config.objective.regularizer,
        "optimizer": config.optimizer.optimizer,
        "channels": channels,
        "precision": system.precision,
        "deterministic": system.deterministic,
        "memory_format": system.memory_format,
    }


_ADAPTER = TypeAdapter(StepTimes)


def read(path: str, recipe: dict[str, Any]) -> StepTimes:
    """Read the file that `--step-times` names.

    Raises:
        ArgumentError: the file cannot be read, has other content, or was measured with another recipe than `recipe`.
    """
    flag, requirement = "--step-times", "must be a file written by --write-step-times"
    try:
        times = _ADAPTER.validate_json(Path(path).read_bytes())
    except OSError as error:
        raise ArgumentError(flag, path, f"{requirement}; {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise ArgumentError(flag, path, f"{requirement}; {where}: {first['msg'].lower()}") from None
    if times.schema != SCHEMA:
        raise ArgumentError(flag, path, f"has schema {times.schema}; this version reads schema {SCHEMA}")
    times = dataclasses.replace(times, recipe=current_names(times.recipe))
    for key, value in recipe.items():
        measured = times.recipe.get(key)
        if measured != value and (key, value) != ("precision", "auto"):  # that of the file
            raise ArgumentError(flag, path, f"was measured with {key} {reprlib.repr(measured)}; the run has {value!r}")
    if not times.timings:
        raise ArgumentError(flag, path, "contains no timings")
    return times


def write(times: StepTimes, path: str) -> None:
    """Write the file that `--write-step-times` names, completely or not at all.

    Raises:
        ArgumentError: the file cannot be written.
    """
    try:
        write_atomic(Path(path), (json.dumps(dataclasses.asdict(times), indent=1) + "\n").encode())
    except OSError as error:
        raise ArgumentError("--write-step-times", path, f"cannot be written ({error.strerror})") from None


def require_writable(path: str) -> None:
    """Check, before anything is measured, that `path` can be written afterwards.

    Raises:
        ArgumentError: it cannot.
    """
    target = Path(path).absolute()
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ArgumentError("--write-step-times", path, "must be a file in an existing, writable folder")
