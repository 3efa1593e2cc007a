"""What the steps of a preparation share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgan.data.preparation.collection import InputCollection
from fastgan.data.preparation.settings import Settings
from fastgan.data.preparation.state import PreparationState
from fastgan.data.preparation.workers import WorkerPool
from fastgan.errors import ArgumentError


@dataclass(frozen=True)
class Context:
    """One call of `prepare`; see there for `strict`, `progress` and `report`."""

    collection: InputCollection
    state: PreparationState
    settings: Settings
    strict: bool
    pool: WorkerPool
    progress: bool
    report: Callable[[str], object]

    def bar(self, description: str, total: int | None, unit: str) -> Any:
        """Return a progress bar."""
        return progress_bar(self.progress, description, total, unit=f" {unit}", smoothing=0.1)

    def unusable(self, problem: str) -> ArgumentError:
        """Return the error for a collection without usable images. DST is removed unless shards are finished."""
        if not self.state.any_finished():
            self.state.remove()
        return ArgumentError("SRC", self.collection.title, problem)


def progress_bar(enabled: bool, description: str, total: int | None, **options: Any) -> Any:
    """Return a tqdm bar that is shown if `enabled` and stderr is a terminal."""
    from tqdm import tqdm

    disable = None if enabled else True  # None: shown only on a terminal
    return tqdm(total=total, desc=description, disable=disable, dynamic_ncols=True, **options)
