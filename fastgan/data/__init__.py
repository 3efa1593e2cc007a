"""Images for training: sources, their order, preparation, and batches on the device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgan.data.loading.pipeline import Batch, Pipeline, fade, open
    from fastgan.data.loading.sampler import Sampler, rank_positions
    from fastgan.data.preparation.prepare import prepare
    from fastgan.data.registry import open_source
    from fastgan.data.source_types import Source

__all__ = ["Batch", "Pipeline", "Sampler", "Source", "fade", "open", "open_source", "prepare", "rank_positions"]

_MODULES = {
    "loading.pipeline": ("Batch", "Pipeline", "fade", "open"),
    "preparation.prepare": ("prepare",),
    "loading.sampler": ("Sampler", "rank_positions"),
    "source_types": ("Source",),
    "registry": ("open_source",),
}


def __getattr__(name: str) -> Any:
    """Import on first use: worker processes of `prepare` must not import torch, which takes seconds."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"fastgan.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
