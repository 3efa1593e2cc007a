"""`--keep-best`: the checkpoint of a run whose images were nearest to the real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgan import checkpoint
from fastgan.errors import ArgumentError
from fastgan.utils.files import read_regular, write_atomic
from fastgan.utils.stored_values import MALFORMED

if TYPE_CHECKING:
    from fastgan.training.trainer import Trainer

METRIC = "frechet_distance"
_RECORD = "best.json"


class BestCheckpoint:
    """Decides after each evaluation whether the next checkpoint is the best one.

    Distances are compared at one resolution and with the same features and images; a checkpoint of a higher resolution
    is better. What the best one had is stored beside it, so that a resumed run goes on comparing.

    Args:
        enabled: without it, nothing is kept.

    Attributes:
        is_due: the checkpoint of this step has to be written, as the best one.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.is_due = False
        self._record: dict[str, Any] = {}

    def consider(self, trainer: Trainer, record: dict[str, Any] | None) -> None:
        """Compare an evaluation, a line of evaluation.jsonl on the first rank; a collective."""
        if not self.enabled:
            return
        if record is not None:
            self._record = {
                "resolution": record["resolution"],
                METRIC: float(record["metrics"][METRIC]),
                "kimg": record["kimg"],
                "measure": [record[key] for key in ("features", "feature_weights", "fingerprint", "images")],
            }
            best = checkpoint.folder(trainer.run_path) / checkpoint.BEST
            self.is_due = math.isfinite(self._record[METRIC]) and _is_better(self._record, _read(best))
        self.is_due = trainer.world.broadcast(self.is_due)

    def keep(self, trainer: Trainer, path: Path) -> None:
        """Keep the checkpoint `path`, of the step just evaluated, if it `is_due`; a collective.

        Raises:
            ArgumentError: on every rank, if it cannot be written.
        """
        if not self.is_due:
            return
        failure = None
        if trainer.world.main:
            try:
                best = checkpoint.keep_best(trainer.run_path, path)
                write_atomic(best / _RECORD, json.dumps(self._record).encode() + b"\n")
            except OSError as error:
                failure = error.strerror or str(error)
        self.is_due = False
        failure = trainer.world.broadcast(failure)
        if failure is not None:
            problem = f"checkpoints/best could not be written ({failure}); the last checkpoint is {path}"
            raise ArgumentError("--out", str(trainer.run_path), problem)


def _read(best: Path) -> dict[str, Any]:
    """The record of the best checkpoint so far; empty without a usable one."""
    try:
        found = json.loads(read_regular(best / _RECORD))
    except (OSError, *MALFORMED):
        return {}
    return found if isinstance(found, dict) else {}


def _is_better(new: dict[str, Any], old: dict[str, Any]) -> bool:
    before, resolution = old.get(METRIC), old.get("resolution")
    if not isinstance(before, float) or not math.isfinite(before) or type(resolution) is not int:
        return True
    if old.get("measure") != new["measure"]:
        return True
    return (-new["resolution"], new[METRIC]) < (-resolution, before)
