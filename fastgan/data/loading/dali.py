"""Images decoded, cropped and resized by NVIDIA DALI, on the CPU or the GPU, a batch ahead.

DALI's own readers shuffle within a buffer and a shard only; here the bytes of each batch are fed to it in the order of
our sampler.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastgan.data.images import area_average, decode, first_line, undecodable
from fastgan.data.loading.image_store import AheadStore, Call, count
from fastgan.data.source import Encoded, Source
from fastgan.errors import ArgumentError

# Formats and modes of Pillow that DALI decodes to the same pixels: 16 bits and transparency are otherwise there.
SAME = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("RGB",),
    "PNG": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB",),
    "BMP": ("L", "RGB"),
    "PPM": ("L", "RGB"),
    "TIFF": ("L", "RGB"),
}


def missing() -> str:
    """Why DALI cannot be used on this machine, or ""."""
    if sys.platform != "linux":
        return "DALI is for Linux only"
    try:
        importlib.import_module("nvidia.dali.fn")
    except ModuleNotFoundError:
        return "DALI is not installed (pip install 'fastgan[dali]')"
    except (ImportError, OSError, RuntimeError) as error:
        return f"DALI cannot be imported ({first_line(error)})"
    return ""


def version() -> str:
    """Of the DALI that is installed."""
    return importlib.import_module("nvidia.dali").__version__


def fault(source: Source, resolution: int) -> str:
    """Why DALI cannot make the images of `resolution`, or ""."""
    files = source.encoded(resolution)
    if files is None:
        return f"{source.name} has no image files to decode"
    for (kind, mode, transparent), file in files.kinds.items():
        if transparent or mode not in SAME.get(kind, ()):
            what = f"a {kind} image of mode {mode}{' with transparency' * transparent}"
            return f"DALI would read {file}, {what}, otherwise or not at all"
    if source.channels not in (1, 3):
        return f"DALI decodes to 1 or 3 channels, not {source.channels}"
    return missing()


class Dali(AheadStore):
    """The image files of a source, decoded by DALI; `fault` must have found nothing.

    pool: threads that read the files' bytes. workers: DALI's threads.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        device: torch.device,
        pool: Executor,
        workers: int,
        indices_of: Callable[[Call], np.ndarray],
    ) -> None:
        super().__init__(indices_of)
        files = source.encoded(resolution)
        assert files is not None
        self._files: Encoded = files
        self._source, self._resolution, self._device = source, resolution, device
        self._pool, self._workers = pool, workers
        # A DALI pipeline is one thread's. A new thread's current device is the first, where it would leave a context.
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._runner = ThreadPoolExecutor(1, "fastgan-dali", *on_device)
        self._graph: Any = None
        self._seen = np.zeros(len(source), dtype=bool)  # that there is an image in the file, whole or not
        self._largest = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._given: deque[tuple[torch.cuda.Event | None, torch.Tensor]] = deque()

    def take(self, call: Call, indices: np.ndarray, on_device: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self._ahead.take(call, indices)[0]
        if self._device.type == "cuda":
            self._keep(images)
        return images

    def describe(self) -> str:
        place = "the CPU" if self._device.type == "cpu" else f"{self._device}"
        return f"decoded on {place} by {count(self._workers, 'thread')}"

    def close(self) -> None:
        super().close()
        self._runner.shutdown(wait=True)
        self._graph = None  # its memory and threads go now, and not when a cycle of references is found

    def _begin(self, indices: np.ndarray) -> list[Future[Any]]:
        return [self._runner.submit(self._decode, indices)]

    def _keep(self, images: torch.Tensor) -> None:
        """Keep a batch until what reads it has run: neither DALI nor `_average`'s stream knows of the caller's."""
        if self._given:
            event = torch.cuda.Event()
            event.record()
            self._given[-1] = (event, self._given[-1][1])
        while self._given and self._given[0][0] is not None and self._given[0][0].query():
            self._given.popleft()
        self._given.append((None, images))

    def _decode(self, indices: np.ndarray) -> torch.Tensor:
        """In the runner's thread: uint8 [n, C, r, r] on the device, channels last in memory."""
        contents = list(self._pool.map(self._read, indices.tolist()))
        images = self._run(contents)
        if isinstance(images, Exception):
            raise self._refused(indices, contents, images)
        images = images.permute(0, 3, 1, 2)
        if self._stream is None:
            return _average(images, self._resolution)
        # On a stream of its own, so that waiting for it is not waiting for the training that is queued: DALI may take
        # the buffer back as soon as this returns.
        with torch.cuda.stream(self._stream):
            averaged = _average(images, self._resolution)
            self._stream.synchronize()
        return averaged

    def _read(self, index: int) -> bytes:
        try:
            content = self._files.read(index)
        except OSError as error:
            reason = f"the file cannot be read ({error.strerror}); put it back"
            raise ArgumentError("--data", self._files.name(index), reason) from error
        if not self._seen[index]:
            from PIL import Image

            # Two files in a batch that DALI finds no image in, and the process dies (a segmentation fault, DALI 2.4).
            try:
                with Image.open(io.BytesIO(content)):
                    self._seen[index] = True
            except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
                raise self._damaged(index, error) from error
        return content

    def _damaged(self, index: int, error: Exception) -> ArgumentError:
        reason = f"the image cannot be decoded ({undecodable(error)}); replace the file"
        return ArgumentError("--data", self._files.name(index), reason)

    def _run(self, contents: list[bytes]) -> torch.Tensor | Exception:
        """uint8 [n, side, side, C], in DALI's own memory; or why not."""
        if self._graph is None or len(contents) > self._largest:
            self._largest = max(self._largest, len(contents))
            self._graph = build(self._files, self._source.channels, self._device, self._largest, self._workers)
        try:
            self._graph.feed_input("files", [np.frombuffer(content, dtype=np.uint8) for content in contents])
            (images,) = self._graph.run()
        except Exception as error:  # RuntimeError and IndexError are seen, with a page of C++ in the message
            # The pipeline is of no more use. It is taken apart here and now, in its own thread: the error's frames
            # would keep it until another thread has handled the error.
            self._graph = None
            return error.with_traceback(None)
        return torch.from_dlpack(images.as_tensor())

    def _refused(self, indices: np.ndarray, contents: list[bytes], error: Exception) -> Exception:
        """The error that names the image that DALI refused, and says whether it is damaged."""
        for index, content in zip(indices.tolist(), contents, strict=True):
            alone = self._run([content])
            if not isinstance(alone, Exception):
                continue
            try:
                decode(io.BytesIO(content), self._files.side, self._source.channels)
                reason = "DALI cannot decode it, and Pillow can; --pipeline torch goes on"
                named = ArgumentError("--data", self._files.name(index), reason)
            except Exception as damage:  # Pillow's decoders raise nearly anything on a damaged file
                named = self._damaged(index, damage)
            named.__cause__ = alone
            return named
        return error


def build(encoded: Encoded, channels: int, device: torch.device, largest: int, threads: int) -> Any:
    """A DALI pipeline from bytes, fed as "files", to the center squares: uint8 [n, side, side, channels], n <= largest.

    Cubic, widened when shrinking: to enlarge it is Pillow's here too; to shrink, Lanczos is Pillow's, and takes DALI as
    long as Pillow. Means of photographs shrunk by two differ by 0.3 of 255.
    """
    from nvidia.dali import Pipeline, fn
    from nvidia.dali import math as dmath
    from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

    gpu = device.type == "cuda"
    # Batches are made ahead by `Ahead`; DALI's own prefetching would want to know the next batch's order itself.
    # exec_dynamic: the memory of an output is its own as long as anyone holds it, and not until the next run.
    place = device.index if gpu else None
    graph = Pipeline(largest, threads, device_id=place, prefetch_queue_depth=1, exec_dynamic=True)
    with graph:
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
        graph.set_outputs(images)
    graph.build()
    return graph


def _average(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """`area_average` wherever the images are: uint8 [n, C, R, R] to [n, C, resolution, resolution]."""
    block = images.shape[-1] // resolution
    if block == 1:
        return images
    if images.device.type == "cpu":
        return torch.from_numpy(area_average(images.numpy(), resolution))
    # Exact: sums of at most 2^16 bytes are whole in float32, and dividing by a power of two changes no digit.
    return F.avg_pool2d(images.float(), block).add_(0.5).floor_().to(torch.uint8)
