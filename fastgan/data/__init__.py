"""Images for training: where they come from, in which order they are seen, and how they reach the device."""

from fastgan.data.pipeline import Batch, Pipeline, fade, open
from fastgan.data.sampler import Sampler, rank_positions
from fastgan.data.sources import Source, open_source

__all__ = ["Batch", "Pipeline", "Sampler", "Source", "fade", "open", "open_source", "rank_positions"]
