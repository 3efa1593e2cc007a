"""The images of a prepared set: one resolution of it (`Level`), and the set as a source."""

from __future__ import annotations

import bisect

import numpy as np

from fastgan.data.faults import raise_if_machine
from fastgan.data.images import channels_first, decode_problem, load_image
from fastgan.data.prepared.manifest import SUFFIXES, Manifest, cache_file, offsets_file, tar_file
from fastgan.data.source_types import MAX_CLASSES, Encoded, Source, require_channels
from fastgan.errors import ArgumentError


class Level:
    """The images of one resolution, read one by one. Thread-safe.

    Args:
        manifest: of the set.
        resolution: px.
        flag: the argument to name in errors.

    Raises:
        ArgumentError: a file is missing or has another size than the manifest says.
    """

    def __init__(self, manifest: Manifest, resolution: int, flag: str = "--data") -> None:
        manifest.require_files(resolution, flag)
        self.manifest = manifest
        self.resolution = resolution
        self._flag = flag
        self.cached = resolution in manifest.cached
        self._arrays: dict[int, np.ndarray] = {}
        self._offsets: np.ndarray | None = None
        if not self.cached:
            self._offsets = manifest.array(offsets_file(resolution), np.int64, (manifest.count, 2), flag)

    def encoded(self, index: int) -> bytes:
        """Return the image file of one image. Only for a resolution that is not cached."""
        assert self._offsets is not None, f"{self.resolution} px is cached"
        offset, length = map(int, self._offsets[index])
        shard = self._shard(index)
        with (self.manifest.path / tar_file(self.resolution, shard)).open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def pixels(self, index: int) -> np.ndarray:
        """Return one image: uint8 [C, resolution, resolution].

        Raises:
            ArgumentError: the image cannot be decoded.
        """
        if self.cached:
            shard = self._shard(index)
            return np.array(self.array(shard)[index - self.manifest.shards[shard].first])
        # WebP has no gray mode: a gray image is stored as three equal planes.
        mode = "L" if self.manifest.channels == 1 else "RGB"
        try:
            with load_image(self.encoded(index), formats=(self.manifest.encoding.upper(),)) as (image, _):
                return channels_first(np.array(image.convert(mode)))
        except Exception as error:  # Pillow's decoders raise nearly any exception on damaged bytes
            raise_if_machine(error, self._flag, self.name(index))
            problem = f"the image cannot be decoded ({decode_problem(error)})"
            hint = "run `fastgan data verify` to list all damaged files"
            raise ArgumentError(self._flag, self.name(index), f"{problem}; {hint}") from error

    def array(self, shard: int) -> np.ndarray:
        """Return one shard, memory-mapped: uint8 [n, C, resolution, resolution]. Only for a cached resolution.

        Raises:
            ArgumentError: the file holds something else.
        """
        array = self._arrays.get(shard)
        if array is None:
            shape = (self.manifest.shards[shard].count, self.manifest.channels, self.resolution, self.resolution)
            array = self.manifest.array(cache_file(self.resolution, shard), np.uint8, shape, self._flag)
            self._arrays[shard] = array
        return array

    def drop_maps(self) -> None:
        """Give up the memory maps that nobody else uses; they are made again when they are needed."""
        self._arrays.clear()

    def name(self, index: int) -> str:
        """Return the name of an encoded image for error messages."""
        file = tar_file(self.resolution, self._shard(index))
        return f"{self.manifest.path / file}, member {index:09}.{SUFFIXES[self.manifest.encoding]}"

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self.manifest.starts, index) - 1


class PreparedSource(Source):
    """A prepared set as a source. Every resolution is stored, so nothing is resized.

    Args:
        manifest: of the set.
        resolution: the target of the run, px.
        channels: must be those of the set, or None.

    Raises:
        ArgumentError: a file of a resolution up to the target is missing or has another size.
    """

    def __init__(self, manifest: Manifest, resolution: int, channels: int | None = None) -> None:
        require_channels(str(manifest.path), manifest.channels, channels)
        if manifest.num_classes > MAX_CLASSES:
            problem = f"it has {manifest.num_classes:,} classes; at most {MAX_CLASSES:,} can be used"
            raise ArgumentError("--data", str(manifest.path), problem)
        if resolution > manifest.resolution:
            problem = (
                f"must be at most {manifest.resolution}; {manifest.path} was prepared up to {manifest.resolution} px"
            )
            raise ArgumentError("--resolution", resolution, problem)
        self.manifest = manifest
        self._levels = {at: Level(manifest, at) for at in manifest.resolutions if at <= resolution}
        super().__init__(
            "prepared",
            resolution=resolution,
            channels=manifest.channels,
            labels=manifest.labels(),
            num_classes=manifest.num_classes,
            classes=manifest.classes() or (),
            fingerprint=manifest.fingerprint,
            path=manifest.path,
        )

    def __len__(self) -> int:
        return self.manifest.count

    def _target(self, index: int) -> np.ndarray:
        return self._read(index, self.resolution)

    def _read(self, index: int, resolution: int) -> np.ndarray:
        return self._levels[resolution].pixels(index)

    def arrays(self, resolution: int) -> list[np.ndarray] | None:
        level = self._levels[resolution]
        for at, other in self._levels.items():
            if at != resolution:
                other.drop_maps()
        return [level.array(shard) for shard in range(len(self.manifest.shards))] if level.cached else None

    def encoded(self, resolution: int) -> Encoded | None:
        """Return the files of the lowest encoded resolution that is at least `resolution`."""
        first_encoded = 2 * max(self.manifest.cached, default=2)
        side = next((at for at in self.manifest.resolutions if at >= max(resolution, first_encoded)), None)
        if side is None:
            return None
        if side not in self._levels:
            self._levels[side] = Level(self.manifest, side)
        level = self._levels[side]
        encoding = self.manifest.encoding.upper()
        mode = "L" if self.channels == 1 and encoding != "WEBP" else "RGB"  # WebP has no gray mode
        kinds = {(encoding, mode, False): level.name(0)}
        return Encoded(level.encoded, level.name, side, kinds, exact=True)
