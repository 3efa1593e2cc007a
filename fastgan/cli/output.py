"""Lines for people: what commands print."""

from __future__ import annotations

import sys

from fastgan.errors import printable


def say(text: object, *, error: bool = False) -> None:
    """Print lines at once, to stderr with `error`. Names of files may hold what a terminal obeys: it is escaped."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    print(lines, file=sys.stderr if error else sys.stdout, flush=True)
