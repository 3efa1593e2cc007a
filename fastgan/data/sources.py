"""What `--data` may name: a set of images that can be read one by one, at any resolution up to the target.

Files from others are data: nothing here is unpickled. Pillow, scikit-learn and torchvision are imported where
they are used, so that a missing one stops only what needs it.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.images import Checked, check, decode, first_line, is_gray, square, undecodable
from fastgan.data.prepared import PreparedSource, begun, is_prepared, read_manifest
from fastgan.data.source import Encoded, Source, is_resolution
from fastgan.data.walk import walk
from fastgan.errors import ArgumentError

_KINDS = (
    "must be digits, stacked-digits, folder:PATH, cifar10:ROOT, mnist:ROOT, celeba:ROOT, synthetic or a prepared "
    "set's folder"
)
_CIFAR_RECORD = 1 + 3 * 32 * 32
logger = logging.getLogger(__name__)


def open_source(spec: str, resolution: int, channels: int | None = None, seed: int = 0) -> Source:
    """Open what `--data` says, checked as far as that is cheap.

    spec: digits | stacked-digits | folder:PATH | cifar10:ROOT | mnist:ROOT | celeba:ROOT | synthetic | the folder of a
    prepared set, recognized by its manifest, or prepared:PATH. resolution: the target, a power of two from 4. channels:
    None for the source's own; a folder converts to 1 or 3, synthetic images have any number. seed: of the synthetic
    images and the stacks.

    Raises: ArgumentError for an unknown spec, a missing or unusable file, a package that cannot be imported,
    or a channel count or resolution the source does not have.
    """
    kind, _, place = spec.partition(":")
    if not is_resolution(resolution):
        raise ArgumentError("--resolution", resolution, "must be a power of two from 4")
    if kind == "prepared" or is_prepared(Path(spec).expanduser()):
        path = Path(place if kind == "prepared" else spec).expanduser()
        return PreparedSource(read_manifest(path), resolution, channels)
    opener = {"folder": _folder, "cifar10": _cifar10, "mnist": _mnist, "celeba": _celeba}.get(kind)
    if spec not in ("digits", "stacked-digits", "synthetic") and (opener is None or not place):
        if spec and Path(spec).expanduser().is_dir():
            found = begun(Path(spec).expanduser()) or f"it has no manifest.json; a folder of images is folder:{spec}"
            raise ArgumentError("--data", spec, found)
        if spec.endswith((".zip", ".tar", ".tar.gz", ".tgz")) or kind in ("zip", "tar"):
            may_be = f"an archive is brought into a folder first: fastgan prepare {spec} SET, and --data SET"
            raise ArgumentError("--data", spec, may_be)
        raise ArgumentError("--data", spec, _KINDS)
    _need("PIL.Image", "pillow", spec)
    if spec == "digits":
        return _digits(spec, resolution, channels)
    if spec == "stacked-digits":
        _require_channels(spec, 3, channels)
        return _StackedDigits(_digits(spec, resolution, None), seed)
    if opener is None:
        return _synthetic(resolution, channels, seed)
    path = Path(place).expanduser()
    if not path.is_dir():
        found = "is a file" if path.exists() else "is missing"
        raise ArgumentError("--data", spec, f"{path} {found}; it may be a folder")
    return opener(spec, path, resolution, channels)


class ArraySource(Source):
    """Images held in memory at their own size, resized when read. images: uint8 [N, C, h, w]."""

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, resolution: int, path: Path | None = None
    ) -> None:
        digest = hashlib.sha256(f"{name} {images.shape} ".encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(np.ascontiguousarray(labels).data)
        super().__init__(
            name,
            resolution=resolution,
            channels=images.shape[1],
            labels=labels,
            num_classes=10,
            fingerprint=digest.hexdigest()[:16],
            path=path,
        )
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def _target(self, index: int) -> np.ndarray:
        from PIL import Image

        planes = (Image.fromarray(plane) for plane in self.images[index])
        return np.stack([np.asarray(square(plane, self.resolution)) for plane in planes])


class _FileSource(Source):
    """One image file per image, decoded when read. files: paths relative to `path`, in order.

    samples: `_sample` of each, where all were opened anyway.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        files: list[str],
        labels: np.ndarray | None,
        num_classes: int,
        resolution: int,
        channels: int,
        skipped: Iterable[tuple[str, str]] = (),
        kinds: dict[tuple[str, str, bool], str] | None = None,
        samples: dict[str, int] | None = None,
    ) -> None:
        digest = hashlib.sha256(f"{name} {len(files)}".encode())
        for file in files:
            sample = "" if samples is None else f" {samples[file]}"
            digest.update(f"\0{file}\0{(path / file).stat().st_size}{sample}".encode(errors="surrogateescape"))
        super().__init__(
            name,
            resolution=resolution,
            channels=channels,
            labels=labels,
            num_classes=num_classes,
            fingerprint=digest.hexdigest()[:16],
            path=path,
            skipped=skipped,
        )
        self._files = files
        # Without a look at each, all are what the set was published as.
        self._kinds = {("JPEG", "RGB", False): files[0]} if kinds is None else kinds

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, resolution: int) -> Encoded | None:
        def name(index: int) -> str:
            return str(self._file(index))

        return Encoded(lambda index: self._file(index).read_bytes(), name, self.resolution, self._kinds)

    def _file(self, index: int) -> Path:
        return self.path / self._files[index] if self.path else Path(self._files[index])

    def _target(self, index: int) -> np.ndarray:
        file = self._file(index)
        try:
            with file.open("rb") as stream:
                return decode(stream, self.resolution, self.channels)
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            reason = f"the image cannot be decoded ({undecodable(error)}); remove the file or replace it"
            raise ArgumentError("--data", str(file), reason) from error


def _digits(spec: str, resolution: int, channels: int | None) -> Source:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 images of 8 x 8 with values 0 to 16."""
    _require_channels("digits", 1, channels)
    digits = _need("sklearn.datasets", "scikit-learn", spec).load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return ArraySource("digits", images, digits.target.astype(np.int64), resolution)


class _StackedDigits(Source):
    """60,000 images with three of the digits in their three channels: 1,000 modes, the label (Metz et al. 2017).

    Which digits those are follows from (seed, index).
    """

    def __init__(self, digits: Source, seed: int) -> None:
        count = 60_000
        words = np.random.Philox(key=np.array([seed % 2**64, 1], dtype=np.uint64)).random_raw(3 * count)
        self._digits = np.stack([digits.read(i, digits.resolution) for i in range(len(digits))])[:, 0]
        self._chosen = (words % len(digits)).astype(np.int64).reshape(count, 3)
        assert digits.labels is not None
        super().__init__(
            "stacked-digits",
            resolution=digits.resolution,
            channels=3,
            labels=digits.labels[self._chosen] @ np.array([100, 10, 1]),
            num_classes=1000,
            fingerprint=hashlib.sha256(f"stacked {seed} {digits.fingerprint}".encode()).hexdigest()[:16],
        )

    def __len__(self) -> int:
        return len(self._chosen)

    def _target(self, index: int) -> np.ndarray:
        return self._digits[self._chosen[index]]


def _synthetic(resolution: int, channels: int | None, seed: int) -> Source:
    """2,048 smooth random pictures for speed runs: 8 x 8 noise, enlarged when read; labels cycle 0 to 9."""
    channels = 3 if channels is None else channels
    if channels < 1:
        raise ArgumentError("--channels", channels, "synthetic may have 1 or more")
    words = np.random.Philox(key=np.array([seed % 2**64, 0], dtype=np.uint64)).random_raw(2048 * channels * 8)
    images = words.astype("<u8").view(np.uint8).reshape(2048, channels, 8, 8)
    return ArraySource("synthetic", images, np.arange(2048, dtype=np.int64) % 10, resolution)


def _cifar10(spec: str, root: Path, resolution: int, channels: int | None) -> Source:
    """The 50,000 training images, from the binary version: the "python version" is a set of pickles."""
    _require_channels("cifar10", 3, channels)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    inner = root / "cifar-10-batches-bin"
    path = inner if inner.is_dir() else root
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        wanted = f"{inner} must hold the binary version, cifar-10-binary.tar.gz unpacked"
        wanted += f"; missing: {', '.join(missing)}"
        if (root / "cifar-10-batches-py").is_dir():
            wanted += "; cifar-10-batches-py is the pickled version, and nothing is unpickled"
        raise ArgumentError("--data", spec, wanted)
    parts = []
    for name in names:
        part = np.fromfile(path / name, dtype=np.uint8)
        if not part.size or part.size % _CIFAR_RECORD or part[::_CIFAR_RECORD].max() > 9:
            reason = f"{path / name} may hold records of {_CIFAR_RECORD} bytes, each led by a label of 0 to 9"
            raise ArgumentError("--data", spec, reason)
        parts.append(part.reshape(-1, _CIFAR_RECORD))
    records = np.concatenate(parts)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return ArraySource("cifar10", images, records[:, 0].astype(np.int64), resolution, path)


def _mnist(spec: str, root: Path, resolution: int, channels: int | None) -> Source:
    """The 60,000 training images, through torchvision's idx readers.

    Not through its `MNIST` class, which prefers an old `processed/training.pt`, a pickle.
    """
    _require_channels("mnist", 1, channels)
    inner = root / "MNIST" / "raw"
    path = inner if inner.is_dir() else root
    files = [path / "train-images-idx3-ubyte", path / "train-labels-idx1-ubyte"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        wanted = f"{inner} must hold train-images-idx3-ubyte and train-labels-idx1-ubyte, unpacked from .gz"
        raise ArgumentError("--data", spec, f"{wanted}; missing: {', '.join(missing)}")
    torchvision = _need("torchvision.datasets.mnist", "torchvision", spec)
    try:
        images = torchvision.read_image_file(str(files[0])).numpy()
        labels = torchvision.read_label_file(str(files[1])).numpy()
    except Exception as error:  # torchvision asserts, and torch raises RuntimeError on a short file
        reason = f"the idx files in {path} cannot be read ({first_line(error)}); copy them anew"
        raise ArgumentError("--data", spec, reason) from error
    if not len(images) or len(images) != len(labels) or labels.max() > 9:
        found = f"{path} holds {len(images)} images and {len(labels)} labels"
        raise ArgumentError("--data", spec, f"{found}; it may hold as many of both, labels 0 to 9")
    return ArraySource("mnist", images[:, None], labels.astype(np.int64), resolution, path)


def _celeba(spec: str, root: Path, resolution: int, channels: int | None) -> Source:
    """All 202,599 aligned faces, without labels; torchvision's `CelebA` reads text and checks its md5."""
    _require_channels("celeba", 3, channels)
    path, names = celeba_files(spec, root)
    try:
        return _FileSource("celeba", path, names, None, 0, resolution, 3)
    except OSError as error:
        raise ArgumentError("--data", spec, f"all {len(names)} images must be there ({error})") from error


def celeba_files(spec: str, root: Path) -> tuple[Path, list[str]]:
    """The folder of the aligned faces, and their names in the order of the published list."""
    celeba = _need("torchvision.datasets", "torchvision", spec).CelebA
    path = root / celeba.base_folder
    try:
        names = list(celeba(str(root), split="all", target_type=[], download=False).filename)
    except Exception as error:  # RuntimeError for missing files, ValueError and others for damaged ones
        lists = [name for _, _, name in celeba.file_list if not name.endswith((".zip", ".7z"))]
        missing = [name for name in ("img_align_celeba", *lists) if not (path / name).exists()]
        wanted = f"{path} must hold the folder img_align_celeba and {', '.join(lists)}"
        other = f"one differs from the published file ({first_line(error)})"
        found = f"missing: {', '.join(missing)}" if missing else other
        raise ArgumentError("--data", spec, f"{wanted}; {found}") from error
    return path / "img_align_celeba", names


def _folder(spec: str, path: Path, resolution: int, channels: int | None) -> Source:
    """Every image below `path`, ordered by relative name; labels are the ranks of first-level subfolders."""
    if channels not in (None, 1, 3):
        raise ArgumentError("--channels", channels, "a folder may be read with 1 or 3")
    listed = list(walk(path))
    skipped = [(name, reason) for name, reason in listed if reason]
    files = [name for name, reason in listed if not reason]
    # Opening waits for the disk more than it computes, so more threads than cores pay.
    with ThreadPoolExecutor(8) as pool:
        checked = dict(zip(files, pool.map(lambda file: _check(path / file), files), strict=True))
    whole = {file: one for file, (one, _) in checked.items() if not one.reason}
    samples = {file: checked[file][1] for file in whole}
    skipped += [(file, one.reason) for file, (one, _) in checked.items() if one.reason]
    if not whole:
        found = "it is empty"
        if skipped:
            found = f"none of its {len(skipped):,} files is an image (first: {': '.join(skipped[0])})"
        raise ArgumentError("--data", spec, f"{path} may be a folder with images below it; {found}")
    small = [one for one in whole.values() if min(one.size) < resolution]
    if small:
        width, height = min((one.size for one in small), key=min)
        count = f"{len(small):,} of {len(whole):,} images are smaller than {resolution} px"
        logger.warning("%s: %s and are enlarged; the smallest is %d x %d", spec, count, width, height)
    if channels is None:
        channels = 1 if all(is_gray(one.mode) for one in whole.values()) else 3
    names = list(whole)
    labels, num_classes = None, 0
    if all("/" in name for name in names):
        classes, ranks = np.unique([name.partition("/")[0] for name in names], return_inverse=True)
        labels, num_classes = ranks.astype(np.int64), len(classes)
    kinds = {(one.kind, one.mode, one.transparent): file for file, one in whole.items()}
    return _FileSource("folder", path, names, labels, num_classes, resolution, channels, skipped, kinds, samples)


def _check(file: Path) -> tuple[Checked, int]:
    if not os.path.isfile(file):  # opening a named pipe would wait forever
        return Checked("no file"), 0
    found = check(lambda: file.open("rb"), str(file))
    return found, 0 if found.reason else _sample(file)


def _sample(file: Path) -> int:
    """CRC-32 of 4 kB in the middle: another file of the same size has others, a copy on another host the same."""
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096) // 2)
        return zlib.crc32(stream.read(4096))


def _require_channels(name: str, own: int, asked: int | None) -> None:
    if asked not in (None, own):
        has = "1 channel" if own == 1 else f"{own} channels"
        raise ArgumentError("--channels", asked, f"{name} has {has}; it may be {own}")


def _need(module: str, package: str, spec: str) -> Any:
    """Import `module`, or say in one line that `spec` needs `package` and why there is none."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # Not only ImportError: a torchvision built for another torch fails with any of these.
        reason = f"it needs {package}, which cannot be imported ({first_line(error)}); pip install {package}"
        raise ArgumentError("--data", spec, reason) from error
