"""The part of a configuration that says which images a run is trained on."""

from __future__ import annotations

from typing import Any

from fastgan.config.sections import Config


def source_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `fastgan.data.open_source`."""
    d = config.data
    return {
        "spec": d.data,
        "resolution": config.schedule.resolution,
        "channels": d.channels,
        "seed": config.run.seed,
        "fit": d.fit,
        "background": d.background,
    }
