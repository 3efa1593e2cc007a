"""Piece 3: which kernels a step spends its time in, and how much of the step the device is idle."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_pieces.context import Context, profile, step_ms
from benchmarks.gpu_pieces.steps import WARM_UP, StepCase, repeats_for, stage_of, step_of

CASES = [StepCase("pggan", px, precision) for precision in ("bf16", "fp32") for px in (1024, 64)]
_LONGEST = 30


def measure(case: StepCase, context: Context) -> dict[str, Any]:
    step = step_of(stage_of(case, context))
    for _ in range(1 if context.rehearse else WARM_UP):
        step()
    whole = step_ms(step, context.device, repeats_for(step_ms(step, context.device, 1), context.rehearse))
    kernels = profile(step, context.device)
    busy = sum(us for _, _, us in kernels) / 1e3
    return {
        **case._asdict(),
        "step_ms": whole,
        "device_ms": busy,
        "idle_share": max(0.0, 1 - busy / whole),
        "launches": sum(count for _, count, _ in kernels),
        "kernels": [{"name": name[:120], "launches": count, "us": us} for name, count, us in kernels[:_LONGEST]],
    }


def run(context: Context) -> None:
    for case in [StepCase("pggan", 8, "bf16", 4)] if context.rehearse else CASES:
        context.attempt(str(case), lambda case=case: measure(case, context))  # type: ignore[misc]
