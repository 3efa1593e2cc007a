"""A store that decodes, crops and resizes with NVIDIA DALI, on the CPU or the GPU, one batch ahead.

DALI's own readers shuffle within a buffer and a shard only. Here DALI is fed the bytes of each batch, in the sampler's
order.
"""

from __future__ import annotations

import importlib
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastgan.data.faults import machine_error, raise_if_machine
from fastgan.data.images import area_average, decode, decode_problem, first_line, open_image
from fastgan.data.loading.image_store import BatchRequest, DecodingStore, counted
from fastgan.data.source_types import Encoded, Source
from fastgan.errors import ArgumentError

# Pillow's formats -> modes that DALI decodes to the same pixels. Not among them: 16 bits, transparency, CMYK (whose
# inversion is told by a marker that DALI does not read), BMP (5 or 6 bits a channel), PGM and PPM (other white values),
# TIFF (at 2 or 4 bits a sample, which the mode does not tell, DALI stops), and black and white, which Pillow resizes
# after it has become gray.
SAME_AS_PILLOW = {
    "JPEG": ("L", "RGB"),
    "MPO": ("RGB",),
    "PNG": ("L", "P", "RGB"),
    "WEBP": ("RGB",),
}


def missing() -> str:
    """Return why DALI cannot be used on this machine, or ""."""
    if sys.platform != "linux":
        return "DALI is available on Linux only"
    try:
        importlib.import_module("nvidia.dali.fn")
    except ModuleNotFoundError:
        return "DALI is not installed (pip install 'fastgan[dali]')"
    except (ImportError, OSError, RuntimeError) as error:
        return f"DALI cannot be imported ({first_line(error)})"
    return ""


def version() -> str:
    """Return the version of the installed DALI."""
    return importlib.import_module("nvidia.dali").__version__


def unsupported_reason(source: Source, resolution: int) -> str:
    """Return why DALI cannot make the images of `resolution`, or ""."""
    files = source.encoded(resolution)
    if files is None:
        return f"{source.name} has no image files to decode"
    for (kind, mode, transparent), file in files.kinds.items():
        if transparent or mode not in SAME_AS_PILLOW.get(kind, ()):
            what = f"a {kind} image of mode {mode}{' with transparency' * transparent}"
            return f"DALI does not decode {file}, {what}, as Pillow does"
    if source.channels not in (1, 3):
        return f"DALI decodes to 1 or 3 channels, not {source.channels}"
    return missing()


class DaliStore(DecodingStore):
    """Decodes the image files of a source with DALI. `unsupported_reason` must be "".

    Args:
        source: the images.
        resolution: px.
        workers: number of DALI's threads.
        prefetching: the arguments of `PrefetchingStore`. The pool reads the files; DALI decodes on the device.
    """

    def __init__(self, source: Source, resolution: int, workers: int, *prefetching: Any) -> None:
        super().__init__(source, resolution, workers, *prefetching)
        device = self._device
        files = source.encoded(resolution)
        assert files is not None
        self._files: Encoded = files
        # A DALI pipeline belongs to one thread, whose current device must be set: it is the first GPU otherwise.
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._runner = ThreadPoolExecutor(1, "fastgan-dali", *on_device)
        self._dali_pipeline: Any = None
        self._opened = np.zeros(len(source), dtype=bool)  # files that Pillow could open
        self._largest = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_use: deque[tuple[torch.cuda.Event | None, torch.Tensor]] = deque()

    def take(self, request: BatchRequest, indices: np.ndarray, device_indices: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self._prefetcher.take(request, indices)[0]
        if self._device.type == "cuda":
            self._keep(images)
        return images

    def describe(self) -> str:
        place = "the CPU" if self._device.type == "cpu" else f"{self._device}"
        return f"decoded on {place} by {counted(self._workers, 'thread')}"

    def close(self) -> None:
        super().close()
        self._runner.shutdown(wait=True)
        self._dali_pipeline = None  # frees its memory and threads now, and not when the garbage collector runs

    def _start(self, indices: np.ndarray) -> list[Future[Any]]:
        return [self._runner.submit(self._decode, indices)]

    def _keep(self, images: torch.Tensor) -> None:
        """Keep a batch until its reader has run: neither DALI nor `_average` knows the caller's stream."""
        if self._in_use:
            event = torch.cuda.Event()
            event.record()
            self._in_use[-1] = (event, self._in_use[-1][1])
        while self._in_use and self._in_use[0][0] is not None and self._in_use[0][0].query():
            self._in_use.popleft()
        self._in_use.append((None, images))

    def _decode(self, indices: np.ndarray) -> torch.Tensor:
        """Decode a batch in the runner's thread: uint8 [n, C, r, r] on the device, channels last in memory."""
        contents = list(self._pool.map(self._read, indices.tolist()))
        images = self._run(contents)
        if isinstance(images, Exception):
            raise self._name_image(indices, contents, images)
        images = images.permute(0, 3, 1, 2)
        if self._stream is None:
            return _average(images, self._resolution)
        # On its own stream, so that waiting for it is not waiting for the queued training steps: DALI may reuse the
        # buffer as soon as this returns.
        with torch.cuda.stream(self._stream):
            averaged = _average(images, self._resolution)
            self._stream.synchronize()
        return averaged

    def _read(self, index: int) -> bytes:
        try:
            content = self._files.read(index)
        except (OSError, MemoryError) as error:
            raise machine_error("--data", self._files.name(index), error) from error
        if not self._opened[index]:
            # DALI 2.4 ends the process with a segmentation fault if two files of a batch are not images.
            try:
                with open_image(content):
                    self._opened[index] = True
            except Exception as error:  # Pillow's readers raise nearly any exception on a damaged file
                raise_if_machine(error, "--data", self._files.name(index))
                raise self._damaged(index, error) from error
        return content

    def _damaged(self, index: int, error: Exception) -> ArgumentError:
        problem = f"the image cannot be decoded ({decode_problem(error)}); replace the file"
        return ArgumentError("--data", self._files.name(index), problem)

    def _run(self, contents: list[bytes]) -> torch.Tensor | Exception:
        """uint8 [n, side, side, C] in DALI's memory, or the error of DALI."""
        if self._dali_pipeline is None or len(contents) > self._largest:
            self._largest = max(self._largest, len(contents))
            self._dali_pipeline = build_pipeline(
                self._files, self._source.channels, self._device, self._largest, self._workers
            )
        try:
            self._dali_pipeline.feed_input("files", [np.frombuffer(content, dtype=np.uint8) for content in contents])
            (images,) = self._dali_pipeline.run()
        except Exception as error:  # RuntimeError and IndexError were seen, with a page of C++ in the message
            # The pipeline is unusable now. It is destroyed here, in its own thread: the error's frames would keep it
            # until another thread has handled the error.
            self._dali_pipeline = None
            return error.with_traceback(None)
        return torch.from_dlpack(images.as_tensor())

    def _name_image(self, indices: np.ndarray, contents: list[bytes], error: Exception) -> Exception:
        """Decode one by one to find the image that DALI refused; the error that names it."""
        for index, content in zip(indices.tolist(), contents, strict=True):
            alone = self._run([content])
            if not isinstance(alone, Exception):
                continue
            try:
                decode(content, self._files.side, self._source.channels)
                problem = "DALI cannot decode it, but Pillow can; use --pipeline torch"
                named = ArgumentError("--data", self._files.name(index), problem)
            except Exception as damage:  # Pillow's decoders raise nearly any exception on a damaged file
                raise_if_machine(damage, "--data", self._files.name(index))
                named = self._damaged(index, damage)
            named.__cause__ = alone
            return named
        return error


def build_pipeline(encoded: Encoded, channels: int, device: torch.device, max_batch: int, threads: int) -> Any:
    """Build a DALI pipeline from the bytes of image files, fed as "files", to their center squares.

    It resizes with an antialiased cubic filter. Pillow enlarges with the same filter here, and shrinks with Lanczos,
    which takes DALI as long as Pillow. Photographs shrunk by two differ by 0.3 of 255 in the mean.

    Args:
        encoded: the files.
        channels: 1 or 3.
        device: where to decode.
        max_batch: largest number of files of a batch.
        threads: on the CPU.

    Returns:
        A pipeline whose output is uint8 [n, side, side, channels], n <= max_batch.
    """
    from nvidia.dali import Pipeline, fn
    from nvidia.dali import math as dmath
    from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

    gpu = device.type == "cuda"
    # `Prefetcher` works ahead; DALI's own prefetching would need to know the order of the next batch.
    # exec_dynamic: an output keeps its memory as long as it is referenced, and not only until the next run.
    device_id = device.index if gpu else None
    pipeline = Pipeline(max_batch, threads, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        files = fn.external_source(name="files", dtype=DALIDataType.UINT8, ndim=1)
        images: Any = fn.decoders.image(
            files,
            device="mixed" if gpu else "cpu",
            output_type=DALIImageType.RGB if channels == 3 else DALIImageType.GRAY,
            jpeg_fancy_upsampling=True,  # as libjpeg and Pillow do
        )
        if not encoded.exact:
            size = fn.cast(fn.peek_image_shape(files)[:2], dtype=DALIDataType.FLOAT)
            shortest = dmath.min(size[0], size[1])
            first = dmath.floor((size - shortest) / 2)
            images = fn.resize(
                images,
                size=[encoded.side, encoded.side],
                roi_start=first,
                roi_end=first + shortest,
                interp_type=DALIInterpType.INTERP_CUBIC,
                antialias=True,
            )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _average(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """`area_average` on the device of the images: uint8 [n, C, R, R] to [n, C, resolution, resolution]."""
    block = images.shape[-1] // resolution
    if block == 1:
        return images
    if images.device.type == "cpu":
        return torch.from_numpy(area_average(images.numpy(), resolution))
    # Exact: float32 holds sums of at most 2^16 bytes, and dividing by a power of two changes no digit.
    return F.avg_pool2d(images.float(), block).add_(0.5).floor_().to(torch.uint8)
