"""From the value of `--data` to a source."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastgan.data.faults import exists, raise_if_machine
from fastgan.data.framing import CROP, Fit, Framing
from fastgan.data.prepared.manifest import is_prepared, read_manifest, unfinished_problem
from fastgan.data.prepared.reader import PreparedSource
from fastgan.data.source_types import Source, import_for, is_resolution
from fastgan.data.sources.avatars import open_avatars
from fastgan.data.sources.builtin import BUILTIN, open_builtin
from fastgan.data.sources.folder import open_folder
from fastgan.data.sources.idx import PREFIXES, is_idx_folder, open_fashion_mnist, open_mnist
from fastgan.data.sources.published import open_celeba, open_cifar10
from fastgan.errors import ArgumentError
from fastgan.utils.text import first_line

_SPECS = (
    "digits, stacked-digits, avatars, fashion-mnist, a folder of images, cifar10:ROOT, mnist:ROOT, celeba:ROOT, "
    "synthetic or the folder of a prepared set"
)
FRAMED = ("folder", "celeba", "avatars")
"""Kinds whose images are framed by --fit and --background when they are read."""
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


class _Kind(NamedTuple):
    """How the specs KIND, KIND:PLACE and KIND:PLACE?OPTION=VALUE are opened.

    Attributes:
        open: the source of a request.
        options: names of options.
        place: whether a folder follows: "always", "maybe" or "other" (something else, or nothing).
    """

    open: Callable[[_Request], Source]
    options: tuple[str, ...] = ()
    place: str = "always"


class _Request(NamedTuple):
    """A spec in its parts, with the other arguments of `open_source`."""

    spec: str
    place: str
    path: Path | None
    options: dict[str, str]
    resolution: int
    channels: int | None
    framing: Framing

    @property
    def root(self) -> Path:
        assert self.path is not None
        return self.path

    @property
    def split(self) -> str:
        split = self.options.get("split", "train")
        if split not in PREFIXES:
            raise ArgumentError("--data", self.spec, f"its split must be train or test, got {split!r}")
        return split


_KINDS: dict[str, _Kind] = {
    "folder": _Kind(lambda r: open_folder(r.spec, r.root, r.resolution, r.channels, r.framing)),
    "cifar10": _Kind(lambda r: open_cifar10(r.spec, r.root, r.resolution, r.channels, r.split), ("split",)),
    "mnist": _Kind(lambda r: open_mnist(r.spec, r.root, r.resolution, r.channels, r.split), ("split",)),
    "fashion-mnist": _Kind(
        lambda r: open_fashion_mnist(r.spec, r.path, r.resolution, r.channels, r.split), ("split",), "maybe"
    ),
    "celeba": _Kind(lambda r: open_celeba(r.spec, r.root, r.resolution, r.channels, r.framing)),
    "avatars": _Kind(
        lambda r: open_avatars(r.spec, r.place, r.resolution, r.channels, r.framing, **r.options), ("n",), "other"
    ),
}


def open_source(
    spec: str | os.PathLike[str],
    resolution: int,
    channels: int | None = None,
    seed: int = 0,
    *,
    fit: Fit = "crop",
    background: str = "white",
) -> Source:
    """Open the images that `--data` names, and check them as far as that is cheap.

    Args:
        spec: `digits`, `stacked-digits`, `synthetic`, `avatars[:STYLE][?n=N]`, `fashion-mnist[:ROOT]`, `mnist:ROOT`,
            `cifar10:ROOT` (these three also with `?split=test`), `celeba:ROOT`, `folder:PATH`, `prepared:PATH`, or a
            path, whose kind is detected.
        resolution: the target, a power of two from 4, px.
        channels: None for the source's own. A folder is converted to 1, 3 or 4 (RGBA, colors multiplied by alpha);
            synthetic images have any number.
        seed: of the synthetic images and of the stacks of digits.
        fit, background: see `Framing`; for the kinds of `FRAMED`.

    Raises:
        ArgumentError: the spec is unknown, a file is missing or unusable, a package cannot be imported, or the source
            does not have these channels or this resolution.
    """
    spec, framing = os.fspath(spec), Framing(fit, background)
    if not is_resolution(resolution):
        raise ArgumentError("--resolution", resolution, "must be a power of two from 4")
    try:
        kind, place = kind_of(spec)
        source = _open(spec, kind, place, resolution, channels, seed, framing)
    except (OSError, MemoryError) as error:
        raise_if_machine(error, "--data", spec)
        raise ArgumentError("--data", spec, f"it cannot be read ({first_line(error)})") from error
    if framing != CROP and kind not in FRAMED:
        source.notes = [*source.notes, f"--fit and --background have no effect on the images of {source.name}"]
    return source


def _open(
    spec: str, kind: str, place: str, resolution: int, channels: int | None, seed: int, framing: Framing
) -> Source:
    """The source of a kind; `place` is what follows it in the spec, or the path."""
    if kind == "prepared":
        return PreparedSource(read_manifest(Path(os.path.expanduser(place))), resolution, channels)
    import_for(spec, "PIL.Image", "pillow")
    framing.validate()
    if kind in BUILTIN:
        return open_builtin(kind, resolution, channels, seed)
    opener = _KINDS[kind]
    place, options = _split_options(spec, place, opener.options)
    path = None if opener.place == "other" or not place else Path(os.path.expanduser(place))
    if path is not None and not path.is_dir():
        why = "is a file" if path.exists() else "is missing"
        raise ArgumentError("--data", spec, f"must be a folder; {path} {why}")
    return opener.open(_Request(spec, place, path, options, resolution, channels, framing))


def kind_of(spec: str) -> tuple[str, str]:
    """Return the kind of source that a value of `--data` names, and what follows it, or its path.

    Raises:
        ArgumentError: it names none.
    """
    if spec in BUILTIN:
        return spec, ""
    kind, colon, place = spec.partition(":")
    name = kind.partition("?")[0]  # of a kind without a place: avatars?n=1000
    if name in _KINDS and not colon and _KINDS[name].place != "always":
        return name, kind[len(name) :]
    if kind in _KINDS and place:
        return kind, place
    if kind == "prepared" and place:
        return kind, place
    path = Path(os.path.expanduser(spec))
    if spec and not path.exists() and "?" in spec:
        path = Path(os.path.expanduser(spec.rpartition("?")[0]))
    if not spec or not path.is_dir():
        raise ArgumentError("--data", spec, _unknown(spec, kind))
    problem = "" if is_prepared(path) else unfinished_problem(path)
    if problem:
        raise ArgumentError("--data", spec, problem)
    return folder_kind(path), spec


def folder_kind(path: Path) -> str:
    """Return the kind of a folder by what is in it: prepared, a published set, or folder."""
    if is_prepared(path):
        return "prepared"
    roots = {
        "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py", "data_batch_1.bin"),
        "mnist": ("MNIST/raw",),
        "fashion-mnist": ("FashionMNIST/raw",),
        "celeba": ("celeba/img_align_celeba",),
    }
    for kind, contents in roots.items():
        if any(exists(path / name, "--data") for name in contents):
            return kind
    if is_idx_folder(path):  # the files of both sets have the same names
        return "fashion-mnist" if "fashion" in path.resolve().name.lower() else "mnist"
    return "folder"


def _split_options(spec: str, place: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """PLACE?NAME=VALUE&NAME=VALUE to its parts; a "?" of a kind without options is part of the place.

    Raises:
        ArgumentError: an option is not known.
    """
    match = re.fullmatch(r"(.*?)\?([\w-]+=[^?]*)", place) if known else None
    if match is None:
        return place, {}
    options = dict(part.partition("=")[::2] for part in match[2].split("&"))
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise ArgumentError("--data", spec, f"its options must be {', '.join(known)}, got {unknown}")
    return match[1], options


def _unknown(spec: str, kind: str) -> str:
    """What is wrong with a spec that names no source."""
    if spec.endswith(_ARCHIVES) or kind in ("zip", "tar"):
        return f"training does not read archives; run `fastgan prepare {spec} SET`, then use --data SET"
    path = Path(os.path.expanduser(spec))
    if spec and os.path.exists(path):
        return f"must be {_SPECS}; it is a file"
    return f"must be {_SPECS}"
