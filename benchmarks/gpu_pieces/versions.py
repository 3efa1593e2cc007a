"""Piece 0: what the machine is, whether the libraries build and load, and what runs each op."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch

import fastgan
from benchmarks.gpu_pieces.context import Context
from fastgan.ops.dispatch import extension
from fastgan.ops.dispatch.backend import OPS, backends
from fastgan.utils.system import cpu_count, device_name

_PACKAGES = ("torch", "triton", "numpy", "deepspeed", "pydantic", "pytest", "pytest-xdist", "pytest-timeout")
_GPU_PROPERTIES = ("name", "major", "minor", "total_memory", "multi_processor_count")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_words(*command: str) -> str | None:
    program = shutil.which(command[0]) or shutil.which(f"/usr/local/cuda/bin/{command[0]}")
    if program is None:
        return None
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=30)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else None


def _machine(context: Context) -> dict[str, Any]:
    gpu = {}
    if context.device.type == "cuda":
        found = torch.cuda.get_device_properties(0)
        gpu = {"gpu": {name: getattr(found, name) for name in _GPU_PROPERTIES}}
    return {
        "device": device_name(context.device),
        **gpu,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _first_words("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _first_words("nvcc", "--version"),
        "python": platform.python_version(),
        "cores": cpu_count(),
        "fastgan": str(fastgan.__file__),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _library(name: str, context: Context) -> dict[str, Any]:
    reason = extension.cpu() if name == "cpu" else extension.cuda()
    if reason is None:
        return {"file": str(extension.file(name))}
    if name == "cuda" and context.rehearse:
        return {"rehearsed": reason}
    return {"fault": reason}


def run(context: Context) -> None:
    context.attempt("machine", lambda: _machine(context))
    for name in ("cpu", "cuda"):
        context.attempt(f"library {name}", lambda name=name: _library(name, context))  # type: ignore[misc]
    for op in OPS:
        x = torch.ones(2, 4, 8, 8, device=context.device)
        given = (x, x, x) if op == "scaled_dot_product_attention" else (x,)
        context.attempt(f"backends {op}", lambda op=op, given=given: dict(backends(op, *given)))  # type: ignore[misc]
