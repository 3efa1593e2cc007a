"""Any number of files, by name: no more of them are held in memory than a few thousand."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeVar, cast

Row = TypeVar("Row", bound=tuple[Any, ...])


def walk(path: Path, everything: bool = False) -> Iterator[tuple[str, str]]:
    """(name, reason) of the files below `path`: relative, "/" between parts, sorted; hidden ones with `everything`.

    The reason is "" but for a folder that cannot be read. Links are followed, as data sets are often put together
    by them, except to a folder that was visited before.
    """
    seen: set[str] = set()

    def below(inside: str) -> Iterator[tuple[str, str]]:
        real = os.path.realpath(path / inside)
        if real in seen:
            return
        seen.add(real)
        try:
            # "a/" for a folder: its files come between those of its neighbors as their whole names do.
            with os.scandir(path / inside) as entries:
                keys = ((one.name + "/" * is_folder(one),) for one in entries if everything or one.name[0] != ".")
                names = sorted_rows(keys)
                first = next(names, None)
        except OSError as error:
            yield inside, error.strerror or str(error)
            return
        for (name,) in itertools.chain([] if first is None else [first], names):
            if name.endswith("/"):
                yield from below(inside + name)
            else:
                yield inside + name, ""

    return below("")


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Not so a link to itself, or to where nobody may look: that says nothing of the files beside it."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def sorted_rows(rows: Iterable[Row], at_once: int = 2**13, at_most: int = 128) -> Iterator[Row]:
    """Sort any number of rows of strings and numbers; `at_once` of them are held in memory, the others in files.

    The input is read wholly before the first row comes out. at_most: files that are open.
    """

    def spill(ordered: Iterable[Row]) -> IO[str]:
        run = stack.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))  # noqa: SIM115
        run.writelines(json.dumps(row) + "\n" for row in ordered)
        run.seek(0)
        return run

    def merged() -> Iterator[Row]:
        return heapq.merge(*((cast(Row, tuple(json.loads(line))) for line in run) for run in runs))

    rows = iter(rows)
    runs: list[IO[str]] = []
    with ExitStack() as stack:
        while part := sorted(itertools.islice(rows, at_once)):
            if len(part) < at_once and not runs:
                yield from part
                return
            if len(runs) == at_most:
                one = spill(merged())
                for run in runs:
                    run.close()
                runs = [one]
            runs.append(spill(part))
        yield from merged()
