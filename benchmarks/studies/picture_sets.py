"""Make the picture sets of the studies from packages, each into a folder that `--data` takes.

    python -m benchmarks.studies.picture_sets [NAME ...] [--out FOLDER] [--size 128]

Without NAMEs, all. FOLDER is outside the repository by default, in the user's cache. Packages are downloaded by their
own clients (`apt-get download`, `npm pack`), and only read: nothing of them is run or installed, and files are copied
by an allow-list of names. A set is in FOLDER/NAME whole or not at all; FOLDER/NAME.json records the packages, their
hashes, the license, and one hash over all files. A set that is there is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastgan.data.sources.avatars import COUNT, STYLE
from fastgan.utils.files import write_atomic
from fastgan.utils.system import cache_folder

Files = Iterator[tuple[str, bytes]]
_LARGEST = 2**26  # bytes of a file in a package


@dataclass(frozen=True)
class PictureSet:
    """A set and where it comes from.

    Attributes:
        packages: (client, name), client "apt", "npm" or "installed".
        license: of the pictures.
        make: (downloaded archives, side of rendered pictures in px) -> (name with "/" between parts, content) of files.
    """

    packages: tuple[tuple[str, str], ...]
    license: str
    make: Callable[[list[Path], int], Files]


def _fashion_mnist(archives: list[Path], size: int) -> Files:
    for name, content in _members(archives[0], r".*/fashion-mnist/[\w-]+-ubyte\.gz"):
        yield PurePosixPath(name).name, content


def _avatars(archives: list[Path], size: int) -> Files:
    import zipfile

    from fastgan.data import open_source

    path = open_source(f"avatars:{STYLE}?n={COUNT}", size).path
    assert path is not None
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            yield name, archive.read(name)


def _fluent_emoji(archives: list[Path], size: int) -> Files:
    """256 px, classes by the categories of another package; three flags of regions are not in its list."""
    (table,) = (content for _, content in _members(archives[1], r"package/emoji\.json"))
    category = {}
    for emoji in json.loads(table):
        for one in (emoji, *emoji.get("skin_variations", {}).values()):
            for code in filter(None, (one["unified"], one["non_qualified"])):
                category[_plain(code)] = emoji["category"]
    for name, content in _members(archives[0], r"package/assets/[\w-]+\.webp"):
        file = PurePosixPath(name)
        yield f"{_folder(category.get(_plain(file.stem), 'Flags'))}/{file.name}", content


def _plain(code: str) -> str:
    """A sequence of code points without the variation selector, as files are named with and without it."""
    return code.lower().replace("-fe0f", "").lstrip("0")


def _openmoji(archives: list[Path], size: int) -> Files:
    """Drawings, rendered; classes are their groups."""
    import resvg_py

    (table,) = (content for _, content in _members(archives[0], r"package/data/openmoji\.json"))
    group = {one["hexcode"]: one["group"] for one in json.loads(table)}
    for name, content in _members(archives[0], r"package/color/svg/[\w-]+\.svg"):
        code = PurePosixPath(name).stem
        svg = content.decode()
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        yield f"{_folder(group.get(code, 'others'))}/{code}.png", bytes(png)


def _sprites(archives: list[Path], size: int) -> Files:
    """Units of a game, 72 px and up; classes are the folders of their kinds."""
    for name, content in _members(archives[0], r".*/data/core/images/units/[\w-]+/.+\.png"):
        kind, *rest = name.partition("/images/units/")[2].split("/")
        yield f"{_folder(kind)}/{'-'.join(rest)}", content


def _folder(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name).strip("-").lower()


SETS = {
    "fashion-mnist": PictureSet((("apt", "dataset-fashion-mnist"),), "MIT, Zalando", _fashion_mnist),
    "avatars": PictureSet(
        (("installed", "dicebear-styles"), ("installed", "dicebear-core"), ("installed", "resvg-py")),
        "CC0 1.0, Pablo Stanley",
        _avatars,
    ),
    "fluent-emoji": PictureSet(
        (("npm", "@lobehub/fluent-emoji-3d"), ("npm", "emoji-datasource-google")), "MIT, Microsoft", _fluent_emoji
    ),
    "openmoji": PictureSet((("npm", "openmoji"), ("installed", "resvg-py")), "CC BY-SA 4.0, OpenMoji", _openmoji),
    "sprites": PictureSet((("apt", "wesnoth-1.16-data"),), "GPL 2 or later, Battle for Wesnoth", _sprites),
}


def _members(archive: Path, pattern: str) -> Files:
    """The regular files of a .tgz or .deb whose whole name matches."""
    packed: io.BytesIO | None = None
    if archive.suffix == ".deb":
        unpack = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True)
        packed = io.BytesIO(unpack.stdout)
    with tarfile.open(archive, fileobj=packed) as tar:
        for member in tar:
            if member.isreg() and member.size <= _LARGEST and re.fullmatch(pattern, member.name):
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content.read()


def _fetch(client: str, package: str, folder: Path) -> Path:
    """Download a package by its client into an empty folder."""
    folder.mkdir()
    command = ["apt-get", "download", package] if client == "apt" else ["npm", "pack", "--silent", package]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.iterdir()
    return archive


def _version(client: str, package: str, archive: Path | None) -> dict[str, str]:
    if archive is None:
        import importlib.metadata

        return {"package": package, "version": importlib.metadata.version(package)}
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"package": package, "from": client, "file": archive.name, "sha256": digest}


def make(name: str, out: Path, size: int) -> dict[str, object]:
    """Make a set unless it is there; returns its record."""
    final, record_file, one = out / name, out / f"{name}.json", SETS[name]
    if final.is_dir() and record_file.is_file():
        return json.loads(record_file.read_bytes())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as temporary:
        work = Path(temporary)
        archives = [
            None if client == "installed" else _fetch(client, package, work / str(number))
            for number, (client, package) in enumerate(one.packages)
        ]
        digests, folder = [], work / "set"
        for file, content in one.make([archive for archive in archives if archive is not None], size):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
            digests.append(f"{file} {hashlib.sha256(content).hexdigest()}")
        if not digests:
            raise SystemExit(f"{name}: the packages have none of the expected files; their layout has changed")
        sources = zip(one.packages, archives, strict=True)
        record: dict[str, object] = {
            "packages": [_version(client, package, archive) for (client, package), archive in sources],
            "license": one.license,
            "size": size,
            "files": len(digests),
            "sha256": hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(),
        }
        if final.exists():  # without a record: of a process that was killed here
            shutil.rmtree(final)
        folder.rename(final)
        write_atomic(record_file, json.dumps(record, indent=1).encode() + b"\n")
    return record


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.picture_sets")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETS))
    parser.add_argument("--out", type=Path, default=cache_folder("sets"))
    parser.add_argument("--size", type=int, default=128, help="side of rendered drawings, px")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in SETS]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(SETS)}, got {unknown[0]!r}")
    for name in args.names or SETS:
        record = make(name, args.out, args.size)
        files, digest = record["files"], str(record["sha256"])[:12]
        print(f"{args.out / name}: {files:,} files, sha256 {digest}, {record['license']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
