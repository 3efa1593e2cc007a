"""What was measured on this machine, in the user's cache: one JSON file for each device and set of versions.

A file is written whole or not at all, and only by the process that has its lock; entries are added, never changed, so
that processes that read it at different moments agree on what both have read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastgan.ops.dispatch import extension
from fastgan.utils.files import try_lock, write_atomic
from fastgan.utils.stored_values import MALFORMED
from fastgan.utils.system import cache_folder, device_name

SCHEMA = 1
_PATIENCE = 120.0  # seconds that a process waits for another one's measurements


@cache
def source_digest() -> str:
    """Digest of all sources that the results and times of an op depend on: ops, Triton kernels, C++ and CUDA."""
    here = Path(__file__).resolve().parent
    folders = [here, here.parent, here.parent / "dispatch"]
    with contextlib.suppress(Exception):
        import fastgan.kernels

        folders += [Path(folder) for folder in fastgan.kernels.__path__]
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*.py")) + sorted(folder.glob("*.json")):
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode())
            digest.update(content)
    for library in extension.LIBRARIES:
        with contextlib.suppress(extension.BuildError, OSError):
            digest.update(extension.source_digest(library, extension.source_folder()).encode())
    return digest.hexdigest()[:16]


def _driver() -> str | None:
    """Version of the NVIDIA driver, where Linux tells it."""
    with contextlib.suppress(OSError):
        found = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else None
    return None


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What the measurements on a device hold for. Values are plain; equal dicts have the same file."""
    same = {"device": device_name(device), "torch": torch.__version__, "sources": source_digest()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {
            **same,
            "capability": f"{major}.{minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "triton": _triton(),
            "tf32": [_precision("conv"), _precision("matmul")],
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    return {**same, "instructions": torch.backends.cpu.get_cpu_capability()}


def _precision(kind: str) -> str | None:
    """How products of float32 are computed; the old flag `allow_tf32` sets it too."""
    owner = getattr(torch.backends.cudnn, "conv", None) if kind == "conv" else torch.backends.cuda.matmul
    return getattr(owner, "fp32_precision", None)


class Unwritable(Exception):
    """The cache cannot be written; the message says why."""


class Store:
    """The measurements of one machine.

    Args:
        about: as from `machine`.
        folder: None: that of the user.

    Attributes:
        classes: label of a class -> what was measured, plain values.
        note: one line about a file that was not understood, else None.
    """

    def __init__(self, about: dict[str, Any], folder: Path | None = None) -> None:
        folder = folder or cache_folder("qualification")
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.about, self.file = about, folder / f"{name}.json"
        self.classes: dict[str, Any] = {}
        self.note: str | None = None
        self.read()

    def read(self) -> None:
        """Read what others have added. A file that is not ours, or broken, counts as empty."""
        try:
            content = self.file.read_bytes()
        except OSError:
            return
        try:
            found = json.loads(content)
            if found["schema"] != SCHEMA or found["machine"] != self.about:
                raise ValueError("it is about another machine")
            classes = {str(label): entry for label, entry in found["classes"].items() if _is_entry(entry)}
        except MALFORMED as error:
            self.note = f"{self.file} is not what was written there ({type(error).__name__}): it is measured anew"
            return
        self.classes = {**self.classes, **classes}

    def add(self, label: str, entry: dict[str, Any]) -> None:
        """Add a class; call it with the lock.

        Raises:
            Unwritable: the file cannot be written; the class is added for this process.
        """
        self.classes[label] = entry
        content = {"schema": SCHEMA, "machine": self.about, "classes": self.classes}
        try:
            write_atomic(self.file, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise Unwritable(f"{self.file} cannot be written ({error.strerror})") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; the others wait, and then read what it has added.

        Raises:
            Unwritable: the lock cannot be made, or another process has it for too long.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = self.file.with_suffix(".lock").open("a")
        except OSError as error:
            raise Unwritable(f"{self.file.parent} cannot be written ({error.strerror})") from error
        with handle:
            end = time.monotonic() + _PATIENCE
            while not try_lock(handle.fileno()):
                if time.monotonic() > end:
                    raise Unwritable(f"another process has {self.file.name} locked for {_PATIENCE:g} s")
                time.sleep(0.01)
            self.read()
            yield


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the file has what `qualification` reads from it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("order"), list):
        return False
    forms = entry.get("forms")
    return (
        isinstance(forms, dict)
        and all(isinstance(it, dict) for it in forms.values())
        and all(isinstance(name, str) and name in forms for name in entry["order"])
        and isinstance(entry.get("why"), str)
        and isinstance(entry.get("until", 0.0), float)
    )
