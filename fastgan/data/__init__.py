"""Images for training: where they come from, in which order they are seen, and how they reach the device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgan.data.pipeline import Batch, Pipeline, fade, open
    from fastgan.data.preparing.preparation import prepare
    from fastgan.data.sampler import Sampler, rank_positions
    from fastgan.data.sources import Source, open_source

__all__ = ["Batch", "Pipeline", "Sampler", "Source", "fade", "open", "open_source", "prepare", "rank_positions"]

_MODULES = {
    "pipeline": ("Batch", "Pipeline", "fade", "open"),
    "preparing.preparation": ("prepare",),
    "sampler": ("Sampler", "rank_positions"),
    "sources": ("Source", "open_source"),
}


def __getattr__(name: str) -> Any:
    """Found when first used: the processes that prepare images have no use for torch, which takes seconds to import."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"fastgan.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
