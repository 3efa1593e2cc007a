"""Piece 8: every kernel once under compute-sanitizer's memcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_pieces.context import Context
from fastgan.ops.dispatch.backend import OPS, CallClass
from fastgan.ops.qualification.beforehand import calls
from fastgan.ops.qualification.cases import cases_of
from fastgan.ops.qualification.measurement import derivatives

ROOT = Path(__file__).resolve().parents[2]
_FOUND = 86  # compute-sanitizer's exit code here when it has something to report
_HOMES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def program() -> str | None:
    return shutil.which("compute-sanitizer") or next((path for path in _HOMES if os.access(path, os.X_OK)), None)


def child(device: torch.device) -> None:
    """Every op, in every form but plain PyTorch, on its odd shape: values and both derivatives."""
    seen: set[tuple[Any, ...]] = set()
    for dtype in (torch.float32, torch.bfloat16):
        for name, inputs, options in calls(device, dtype):
            first = inputs[0]
            assert first is not None
            if (name, dtype, first.is_contiguous()) in seen or (device.type == "cpu" and first.numel() > 2**14):
                continue
            seen.add((name, dtype, first.is_contiguous()))
            op = OPS[name]
            key = op.class_of(*inputs, **options)
            assert key is not None
            cases = cases_of(name, CallClass(*key), inputs, options)
            tensors = cases.tensors(cases.odd, dtype, device)
            for form, it in op.implementations.items():
                if form != "torch" and it.unsupported_reason(*tensors, **cases.odd.options) is None:
                    print(name, dtype, form, flush=True)
                    derivatives(partial(cases.odd.call, form), tensors)


def _check(context: Context) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.gpu_pieces.sanitizer", context.device.type]
    if not context.rehearse:
        found = program()
        if found is None:
            return {"fault": "compute-sanitizer is not installed"}
        words = [found, "--tool", "memcheck", "--error-exitcode", str(_FOUND), *words]
    # The caching allocator would hide accesses beyond a tensor's end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        return {"fault": f"exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}"}
    return {"calls": len([line for line in done.stdout.splitlines() if " torch." in line])}


def run(context: Context) -> None:
    context.attempt("memcheck", lambda: _check(context))


if __name__ == "__main__":
    child(torch.device(sys.argv[1]))
