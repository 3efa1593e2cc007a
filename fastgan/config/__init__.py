"""Configuration of a run: what is asked for, its file form, and the checks that need no data and no device."""

from fastgan.config.batches import active_ranks, batch_at, batches_for_all
from fastgan.config.rules import validate, without_effect
from fastgan.config.sections import (
    Config,
    Data,
    LossName,
    ModelName,
    Networks,
    Norm,
    Objective,
    Optimizer,
    Precision,
    RegularizerName,
    Run,
    Schedule,
    System,
    replace,
    to_dict,
)

__all__ = [
    "Config",
    "Data",
    "LossName",
    "ModelName",
    "Networks",
    "Norm",
    "Objective",
    "Optimizer",
    "Precision",
    "RegularizerName",
    "Run",
    "Schedule",
    "System",
    "active_ranks",
    "batch_at",
    "batches_for_all",
    "replace",
    "to_dict",
    "validate",
    "without_effect",
]
