"""Batches: how large one is at a resolution, and how many ranks share it."""

from __future__ import annotations

from fastgan.config.sections import Schedule


def batch_at(schedule: Schedule, resolution: int) -> int:
    """Images of a discriminator step at `resolution`: the smallest entry of `batch_at` at or below it, or `batch`."""
    limits = [size for at, size in schedule.batch_at.items() if at <= resolution]
    return min([schedule.batch, *limits])


def batches_for_all(schedule: Schedule, world: int) -> str:
    """Flags that leave none of `world` ranks without images at any resolution, and batches else as they are."""
    least = world * schedule.accumulation
    if schedule.batch <= least:
        return f"--batch {least}" + (" --batch-at" if schedule.batch_at else "")
    pairs = [f"{at} {max(size, least)}" for at, size in sorted(schedule.batch_at.items())]
    return " ".join(["--batch-at", *pairs])


def active_ranks(batch: int, world: int, accumulation: int) -> int | None:
    """How many of `world` ranks share a batch, in `accumulation` micro-batches each; None: it cannot be shared.

    All of them where it divides. A batch of fewer images than there are micro-batches goes to as many ranks as it
    divides over, and the others have no part in it.
    """
    if batch % (world * accumulation) == 0:
        return world
    if batch > world * accumulation:
        return None
    return next((n for n in range(batch // accumulation, 0, -1) if batch % (n * accumulation) == 0), None)
