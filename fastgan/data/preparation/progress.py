"""Progress bars on stderr."""

from __future__ import annotations

from typing import Any


def progress_bar(enabled: bool, description: str, total: int | None, **options: Any) -> Any:
    """Return a tqdm bar that is shown if `enabled` and stderr is a terminal."""
    from tqdm import tqdm

    disable = None if enabled else True  # None: shown only on a terminal
    return tqdm(total=total, desc=description, disable=disable, dynamic_ncols=True, **options)
