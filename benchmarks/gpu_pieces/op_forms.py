"""Piece 1: every op in every implementation, to second order, against plain PyTorch in float64; and random numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_pieces.context import Context, host_ms, replayed_us
from fastgan.ops.dispatch.backend import OPS, CallClass
from fastgan.ops.qualification.beforehand import calls
from fastgan.ops.qualification.measurement import measure
from fastgan.utils.counter_kernels import first_difference
from fastgan.utils.counter_rng import DEFINITION


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


def _finite(value: float | None) -> float | None:
    """None for what JSON has no number for: the error of a NaN, a time that other programs disturbed."""
    return value if value is not None and math.isfinite(value) else None


def _compare(name: str, inputs: tuple[Tensor | None, ...], options: Any) -> dict[str, Any]:
    op = OPS[name]
    key = op.class_of(*inputs, **options)
    assert key is not None
    able = [n for n, it in op.implementations.items() if it.unsupported_reason(*inputs, **options) is None]
    found = measure(op, CallClass(*key), inputs, options, able)
    wrong = {form: it.wrong for form, it in found.items() if it.wrong}
    values: dict[str, Any] = {
        "errors": {form: _finite(it.error) for form, it in found.items()},
        "plain_error": max(it.plain_error for it in found.values()),
        "device_us": {form: _finite(it.device_us) for form, it in found.items()},
        "host_us": {form: _finite(it.host_us) for form, it in found.items()},
    }
    return {**values, "fault": f"WRONG: {wrong}"} if wrong else values


def _random_numbers(context: Context) -> dict[str, Any]:
    """The latents of a batch; the kernel's have to be those of torch's operations to the bit, whatever they are."""
    device, forms, wrong = context.device, {"torch": DEFINITION["normal"]}, None
    if not context.rehearse:
        from fastgan.kernels import counter_rng as kernels

        wrong = first_difference(kernels, DEFINITION, device)
        forms["triton"] = kernels.normal
    index = torch.arange(64, device=device)
    runs = {name: (lambda draw=draw: draw(77, index, 512)) for name, draw in forms.items()}
    values: dict[str, Any] = {
        "errors": dict.fromkeys(runs, 0.0),
        "device_us": {name: replayed_us(draw, device) for name, draw in runs.items()},
        "host_us": {name: 1e3 * host_ms(draw, device, 20) for name, draw in runs.items()},
    }
    return {**values, "fault": wrong} if wrong else values


def run(context: Context) -> None:
    context.attempt("random numbers float32", lambda: _random_numbers(context))
    for dtype in (torch.float32, torch.bfloat16):
        # Training's memory format first: what is cut comes in the next call.
        found = sorted(_first_calls(context, dtype).items(), key=lambda it: " contiguous " in it[0])
        for label, call in found:
            context.attempt(label, lambda call=call: _compare(*call))  # type: ignore[misc]
