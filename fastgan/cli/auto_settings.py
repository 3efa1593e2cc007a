"""What a run is to be where the command line leaves it to the pictures and the machine: --preset auto and --hours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from fastgan.cli.run_request import RunRequest, with_notes
from fastgan.config.auto import Wish
from fastgan.training.auto import decide, fixed_values
from fastgan.training.distributed.process_group import ProcessGroup


@dataclass(frozen=True)
class Settled:
    """A request without open ends.

    Attributes:
        request: its configuration is the run's.
        lines: the plan with its reasons.
        costs: seconds for each image at each resolution; empty where nothing was measured.
    """

    request: RunRequest
    lines: list[str] = field(default_factory=list)
    costs: dict[int, float] = field(default_factory=dict)


def settle(request: RunRequest, world: ProcessGroup, ranks: int) -> Settled:
    """Decide what the request leaves open, the same on all ranks; a collective. A run that is resumed has nothing open.

    Args:
        request: the command line.
        world: the ranks.
        ranks: number of ranks of the run; `world` is smaller in a dry run.

    Raises:
        ArgumentError: the data cannot be opened, or a value does not fit to what was decided.
    """
    auto, hours = request.preset == "auto", request.flags.hours
    if request.resume is not None or not (auto or hours is not None):
        return Settled(request)
    variant = request.variant if request.names_variant else None
    length = {"kimg"} if hours is not None else set()  # that of a file, which --hours replaces as a flag does
    wish = Wish(variant, hours, fixed_values(request.config, request.given - length))
    outcome = decide(request.config, request.variant, wish, auto, world, ranks)
    decided = dataclasses.replace(request, config=outcome.config, variant=outcome.variant, names_variant=True)
    return Settled(with_notes(decided), outcome.lines, outcome.costs)
