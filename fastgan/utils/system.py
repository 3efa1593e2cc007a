"""What the machine says of itself: processors, memory, folders for caches."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_THREADS = 1024
"""Most threads or processes that one rank or command starts."""


def cpu_count() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder(name: str) -> Path:
    """The user's folder for fastgan's cache of `name`; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan" / name


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor with the number of threads that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU of {platform.machine()}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def missing_device(kind: str) -> str:
    """What `--device` must be instead of "cuda" or "mps" where this machine or this torch has none; "" if it has."""
    import torch

    if kind == "cuda":
        return "" if torch.cuda.is_available() else "must be cpu; torch sees no GPU here"
    if torch.backends.mps.is_available():
        return ""
    why = "torch sees no Apple GPU here" if torch.backends.mps.is_built() else "this torch is built without MPS"
    return f"must be cpu{' or cuda' * torch.cuda.is_available()}; {why}"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, as named in /proc/cpuinfo; empty where there is no such file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    of_first = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(of_first.split())
