"""Training: `train` from Python, and what `fastgan train` is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

__all__ = ["train"]


def train(
    variant: str = "pggan", preset: str = "digits", *, resume: str | Path | None = None, **sections: dict[str, Any]
) -> Path:
    """Train as `fastgan train` does, in this process or as one of the ranks of torchrun or deepspeed.

        run = train("dcgan", "digits", schedule={"kimg": 100.0}, run={"out": "runs/mine"})
        fastgan.load(run).sample(16)

    Networks and losses of your own: `fastgan.models.register` and `fastgan.objectives.register`.

    Args:
        variant: name of one of the nine, from whose preset the configuration starts.
        preset: "paper" or "digits"; pggan has "paper-8-gpus" too.
        resume: run or checkpoint folder to resume; the other arguments are those that it was started with.
        sections: values of a section of `fastgan.config.Config` by field: networks, objective, optimizer, schedule,
            data, run, system.

    Returns:
        The run directory. A signal ends training early, with a checkpoint.

    Raises:
        ArgumentError: a value cannot be used. (It is a ValueError.)
        RuntimeError: a loss was not finite, or ran away and did not come back.
    """
    from fastgan.training.session import train

    return train(variant, preset, resume=resume, **sections)
