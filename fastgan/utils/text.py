"""Text for people: sizes, durations, errors in one line."""

from __future__ import annotations


def readable_size(count: float) -> str:
    """A number of bytes, as in "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:  # 999.7 would round to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def readable_duration(seconds: float) -> str:
    """Seconds, as in "39 s", "12.5 min", "3.2 h" or "1.4 d"."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def first_line(error: Exception) -> str:
    """First line of an error's text, at most 150 characters; the name of its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
