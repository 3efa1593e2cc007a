"""From the value of `--data` to a source."""

from __future__ import annotations

from pathlib import Path

from fastgan.data.faults import machine_error
from fastgan.data.prepared.manifest import is_prepared, read_manifest, unfinished_problem
from fastgan.data.prepared.reader import PreparedSource
from fastgan.data.source import Source, import_for, is_resolution
from fastgan.data.sources.builtin import BUILTIN, open_builtin
from fastgan.data.sources.folder import open_folder
from fastgan.data.sources.published import open_celeba, open_cifar10, open_mnist
from fastgan.errors import ArgumentError

_OPENERS = {"folder": open_folder, "cifar10": open_cifar10, "mnist": open_mnist, "celeba": open_celeba}
_SPECS = (
    "digits, stacked-digits, folder:PATH, cifar10:ROOT, mnist:ROOT, celeba:ROOT, synthetic or the folder of a "
    "prepared set"
)


def open_source(spec: str | Path, resolution: int, channels: int | None = None, seed: int = 0) -> Source:
    """Open the images that `--data` names, and check them as far as that is cheap.

    Args:
        spec: digits | stacked-digits | folder:PATH | cifar10:ROOT | mnist:ROOT | celeba:ROOT | synthetic | the folder
            of a prepared set, recognized by its manifest, or prepared:PATH.
        resolution: the target, a power of two from 4, px.
        channels: None for the source's own. A folder is converted to 1 or 3; synthetic images have any number.
        seed: of the synthetic images and of the stacks of digits.

    Raises:
        ArgumentError: the spec is unknown, a file is missing or unusable, a package cannot be imported, or the source
            does not have these channels or this resolution.
    """
    spec = str(spec)
    kind, _, place = spec.partition(":")
    if not is_resolution(resolution):
        raise ArgumentError("--resolution", resolution, "must be a power of two from 4")
    if kind == "prepared" or is_prepared(Path(spec).expanduser()):
        path = Path(place if kind == "prepared" else spec).expanduser()
        return PreparedSource(read_manifest(path), resolution, channels)
    if spec not in BUILTIN and (kind not in _OPENERS or not place):
        raise ArgumentError("--data", spec, _unknown(spec, kind))
    import_for(spec, "PIL.Image", "pillow")
    if spec in BUILTIN:
        return open_builtin(spec, resolution, channels, seed)
    path = Path(place).expanduser()
    if not path.is_dir():
        raise ArgumentError(
            "--data", spec, f"must be a folder; {path} {'is a file' if path.exists() else 'is missing'}"
        )
    try:
        return _OPENERS[kind](spec, path, resolution, channels)
    except (OSError, MemoryError) as error:
        raise machine_error("--data", spec, error) from error


def _unknown(spec: str, kind: str) -> str:
    """What is wrong with a spec that names no source."""
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return unfinished_problem(path) or f"the folder has no manifest.json; use folder:{spec} for a folder of images"
    if spec.endswith((".zip", ".tar", ".tar.gz", ".tgz")) or kind in ("zip", "tar"):
        return f"training does not read archives; run `fastgan prepare {spec} SET`, then use --data SET"
    return f"must be {_SPECS}"
