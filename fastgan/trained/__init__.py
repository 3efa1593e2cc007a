"""Small trained generators that come with fastgan, by name: `fastgan sample avatars`, `fastgan.load("avatars")`.

    fastgan/trained/NAME.safetensors                 the averaged generator, an export like any other
    fastgan/trained/NAME.md                          how it was made
    fastgan/trained/NAME.discriminator.safetensors   its discriminator, for `--init-from NAME`

A path wins over a name: with a folder `avatars` in the working directory, `avatars` means that folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastgan.errors import ArgumentError

__all__ = ["names"]

FOLDER = Path(__file__).parent
SUFFIX = ".safetensors"
DISCRIMINATOR_SUFFIX = ".discriminator.safetensors"


def names() -> list[str]:
    """The names of the generators that are here, sorted."""
    files = (file.name for file in FOLDER.glob(f"*{SUFFIX}"))
    return sorted(name.removesuffix(SUFFIX) for name in files if not name.endswith(DISCRIMINATOR_SUFFIX))


def discriminator_of(file: Path) -> Path | None:
    """The file with the discriminator of one of our own generators, given the generator's file."""
    found = FOLDER / f"{file.name.removesuffix(SUFFIX)}{DISCRIMINATOR_SUFFIX}"
    return found if file.parent == FOLDER and found.is_file() else None


def name_of(path: str | Path) -> str | None:
    """The name of the generator that `resolve` takes `path` for; None if it is a path."""
    return str(path) if not os.path.lexists(path) and str(path) in names() else None


def resolve(path: str | Path, flag: str = "RUN") -> Path:
    """`path` if there is such a path, else the file of the generator of that name.

    Raises:
        ArgumentError: there is neither; the message has the names.
    """
    name = name_of(path)
    if name is not None:
        return FOLDER / f"{name}{SUFFIX}"
    if os.path.lexists(path):
        return Path(path)
    own = f", or {' or '.join(names())}" if names() else ""
    problem = f"must be a run with a checkpoint or an exported file{own}; there is no such file or folder"
    raise ArgumentError(flag, str(path), problem)


def hint(error: ArgumentError) -> ArgumentError:
    """`error` about a path that hides a generator of ours, with where that is; others as they are."""
    if str(error.got) not in names():
        return error
    file = FOLDER / f"{error.got}{SUFFIX}"
    problem = f"{error.problem}; the generator of this name that comes with fastgan is {file}"
    return ArgumentError(error.argument, error.got, problem)
