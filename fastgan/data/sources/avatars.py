"""Avatars: drawings by DiceBear, any number at any size, each from a seed; rendered by resvg once and cached."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.resources
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.faults import raise_if_machine
from fastgan.data.framing import Framing
from fastgan.data.images import decode, first_line
from fastgan.data.source_types import Source, import_for
from fastgan.errors import ArgumentError
from fastgan.utils.files import AtomicFile
from fastgan.utils.system import cache_folder

STYLE = "open-peeps"  # by Pablo Stanley, CC0: faces in color on a transparent ground
COUNT = 10_000
_MOST = 1_000_000
_PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")


def open_avatars(
    spec: str, style: str, resolution: int, channels: int | None, framing: Framing, n: str = str(COUNT)
) -> Source:
    """Avatars 0 to n - 1 of a style. Avatar i depends on the style and i alone.

    Args:
        style: one of dicebear-styles; "" for `STYLE`.
        channels: 1, 3 or 4; None: 3.
        n: how many, as text.

    Raises:
        ArgumentError: a package is missing, there is no such style, or the cache cannot be written.
    """
    if channels not in (None, 1, 3, 4):
        raise ArgumentError("--channels", channels, "must be 1, 3 or 4")
    if not n.isdecimal() or not 1 <= int(n) <= _MOST:
        raise ArgumentError("--data", spec, f"its n must be a whole number from 1 to {_MOST:,}")
    return _Avatars(spec, style or STYLE, int(n), resolution, channels or 3, framing)


class _Avatars(Source):
    """PNG files in one zip, which is in the cache whole or not at all."""

    def __init__(self, spec: str, style: str, count: int, resolution: int, channels: int, framing: Framing) -> None:
        renderer = _Renderer(spec, style)
        key = f"{style} {count} {resolution} {renderer.versions}"
        name = f"{style}-{resolution}px-{count}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.zip"
        self._file = cache_folder("avatars") / name
        if not _is_whole(self._file, count):
            _render(spec, renderer, count, resolution, self._file)
        with zipfile.ZipFile(self._file) as archive:
            members = archive.infolist()
        # Members are stored, not compressed, and written by `_render`: local headers have no extra field.
        self._places = [(one.header_offset + 30 + len(one.filename), one.file_size) for one in members]
        digest = hashlib.sha256(f"avatars {framing} {channels} {[one.CRC for one in members]}".encode())
        self._framing = framing
        super().__init__(
            "avatars",
            resolution=resolution,
            channels=channels,
            labels=None,
            num_classes=0,
            fingerprint=digest.hexdigest()[:16],
            path=self._file,
            notes=renderer.license(),
        )

    def __len__(self) -> int:
        return len(self._places)

    def _target(self, index: int) -> np.ndarray:
        offset, size = self._places[index]
        try:
            with self._file.open("rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
            return decode(content, self.resolution, self.channels, framing=self._framing)
        except Exception as error:  # Pillow's decoders raise nearly any exception on a damaged file
            raise_if_machine(error, "--data", str(self._file))
            problem = f"image {index} cannot be decoded ({first_line(error)}); delete the file to render it again"
            raise ArgumentError("--data", str(self._file), problem) from error


class _Renderer:
    """Seeds to PNG files."""

    def __init__(self, spec: str, style: str) -> None:
        modules = ("dicebear", "dicebear_styles", "resvg_py")
        self._dicebear, _, self._resvg = (import_for(spec, module, " ".join(_PACKAGES)) for module in modules)
        folder = importlib.resources.files("dicebear_styles")
        styles = sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))
        if style not in styles:
            raise ArgumentError("--data", spec, f"its style must be one of {', '.join(styles)}")
        content = json.loads((folder / f"{style}.json").read_text(encoding="utf-8"))
        self._meta = content.get("meta", {})
        self._style = self._dicebear.Style(content)
        self.versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)

    def __call__(self, index: int, side: int) -> bytes:
        svg = self._dicebear.Avatar(self._style, {"seed": str(index)}).to_string()
        return bytes(self._resvg.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))

    def license(self) -> tuple[str, ...]:
        def name(key: str) -> str:
            return str(self._meta.get(key, {}).get("name", "unknown"))

        return (f"avatars of the style {name('source')} by {name('creator')}, license: {name('license')}",)


def _is_whole(file: Path, count: int) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return len(archive.infolist()) == count
    except (OSError, zipfile.BadZipFile) as error:
        cause = error.__context__ if isinstance(error, zipfile.BadZipFile) else error  # zipfile hides an OSError in it
        if cause is not None and getattr(cause, "errno", None) not in (errno.ENOENT, errno.ENOTDIR):
            raise_if_machine(cause, "--data", str(file))  # rendering again takes minutes, and would not help
        return False


def _render(spec: str, renderer: _Renderer, count: int, side: int, file: Path) -> None:
    """Render into a zip. Several processes may do it at once: their files are equal, and the last one stays."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFile(file) as out:
            with zipfile.ZipFile(_Unseekable(out), "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
                for index in _progress(count, f"rendering {spec} at {side} px"):
                    archive.writestr(zipfile.ZipInfo(f"{index:07}.png"), renderer(index, side))
            out.commit()
    except OSError as error:
        problem = f"the cache {file} cannot be written ({error.strerror}); XDG_CACHE_HOME names another place"
        raise ArgumentError("--data", spec, problem) from error


class _Unseekable:
    """An `AtomicFile` as zipfile writes to it."""

    def __init__(self, file: AtomicFile) -> None:
        self._file = file

    def write(self, content: Any) -> int:
        self._file.write(content)
        return len(content)

    def flush(self) -> None:
        pass


def _progress(count: int, what: str) -> Iterator[int]:
    """0 to `count` - 1, with a bar on a terminal, and a line elsewhere."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        print(f"{what}: {count:,} images", file=sys.stderr, flush=True)
    yield from tqdm(range(count), desc=what, unit="img", dynamic_ncols=True, disable=None)
