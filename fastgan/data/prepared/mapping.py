"""Memory maps of .npy files that keep no file descriptor.

`mmap.mmap`, and with it `np.load(mmap_mode="r")`, holds a descriptor for each map. A set has a file for every shard of
every resolution, and a process may open 1,024 files on most systems.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastgan.utils.files import open_regular

_PROT_READ, _MAP_SHARED = 1, 1  # the same numbers on Linux, macOS and the BSDs
# NumPy parses headers with `ast`, which fails in Python 3.11 when two threads use it at once (SystemError).
_HEADER_LOCK = threading.Lock()


def load_npy(file: Path) -> np.ndarray:
    """Read a .npy file into memory. Nothing is unpickled.

    Raises:
        Exception: nearly any, if the file is damaged.
    """
    with _open(file) as stream:
        dtype, shape, fortran, _ = _header(stream)
        _require_whole(os.fstat(stream.fileno()).st_size - stream.tell(), dtype, shape)
        content = np.fromfile(stream, dtype=dtype, count=int(np.prod(shape, dtype=np.int64)))
    return content.reshape(shape, order="F" if fortran else "C")


def map_npy(file: Path) -> np.ndarray:
    """Map a .npy file, read-only. Nothing is unpickled.

    Raises:
        Exception: nearly any, if the file is damaged.
    """
    with _open(file) as stream:
        dtype, shape, fortran, start = _header(stream)
        size = os.fstat(stream.fileno()).st_size
        _require_whole(size - start, dtype, shape)
        if os.name == "nt" or size == start:  # an empty map is refused by the system
            return np.load(file, mmap_mode="r" if size > start else None, allow_pickle=False)
        buffer = _map(stream.fileno(), size)
    count = int(np.prod(shape, dtype=np.int64))
    flat = np.frombuffer(memoryview(buffer).cast("B"), dtype=dtype, count=count, offset=start)
    flat.flags.writeable = False
    return flat.reshape(shape, order="F" if fortran else "C")


def _open(file: Path) -> BinaryIO:
    return open(open_regular(file, os.O_RDONLY), "rb")


def _header(stream: BinaryIO) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Dtype, shape, whether the order is Fortran's, and where the values start."""
    with _HEADER_LOCK:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = read[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return dtype, shape, fortran, stream.tell()


def _require_whole(size: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    expected = dtype.itemsize
    for length in shape:
        expected *= length
    if size < expected:
        raise ValueError(f"{size} of {expected} bytes")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _map(descriptor: int, size: int) -> ctypes.Array[ctypes.c_char]:
    """Map the first `size` bytes of an open file; unmapped with the returned buffer."""
    libc = _libc()
    address = libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    buffer = (ctypes.c_char * size).from_address(address)
    weakref.finalize(buffer, libc.munmap, address, size).atexit = False  # a thread may still read
    return buffer
