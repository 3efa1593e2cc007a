"""Piece 1: every op in every implementation, to second order, against plain PyTorch in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_pieces.context import Context
from fastgan.ops.dispatch.backend import OPS, CallClass
from fastgan.ops.qualification.beforehand import calls
from fastgan.ops.qualification.measurement import measure


def _first_calls(context: Context, dtype: torch.dtype) -> dict[str, tuple[str, tuple[Tensor | None, ...], Any]]:
    """One call of each op, memory format and kind of options: what is compared has small shapes of its own."""
    found: dict[str, tuple[str, tuple[Tensor | None, ...], Any]] = {}
    for name, inputs, options in calls(context.device, dtype):
        first = inputs[0]
        assert first is not None
        layout = "channels_last" if first.ndim == 4 and not first.is_contiguous() else "contiguous"
        act = f" act {options['act']}" if name == "bias_act" else ""
        found.setdefault(f"{name}{act} {layout} {str(dtype).removeprefix('torch.')}", (name, inputs, options))
    return found


def _compare(name: str, inputs: tuple[Tensor | None, ...], options: Any) -> dict[str, Any]:
    op = OPS[name]
    key = op.class_of(*inputs, **options)
    assert key is not None
    able = [n for n, it in op.implementations.items() if it.unsupported_reason(*inputs, **options) is None]
    found = measure(op, CallClass(*key), inputs, options, able)
    wrong = {form: it.wrong for form, it in found.items() if it.wrong}
    values: dict[str, Any] = {
        "errors": {form: it.error if math.isfinite(it.error) else None for form, it in found.items()},
        "plain_error": max(it.plain_error for it in found.values()),
        "device_us": {form: it.device_us for form, it in found.items()},
        "host_us": {form: it.host_us for form, it in found.items()},
    }
    return {**values, "fault": f"WRONG: {wrong}"} if wrong else values


def run(context: Context) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # Training's memory format first: what is cut comes in the next call.
        found = sorted(_first_calls(context, dtype).items(), key=lambda it: " contiguous " in it[0])
        for label, call in found:
            if context.rehearse and call[1][0].numel() > 2**14:  # type: ignore[union-attr]
                continue
            context.attempt(label, lambda call=call: _compare(*call))  # type: ignore[misc]
