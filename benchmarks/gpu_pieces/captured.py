"""Piece 5: the whole step as a CUDA graph: equal to an eager step, and how much faster."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_pieces.context import Context, host_ms, step_ms
from benchmarks.gpu_pieces.steps import StepCase, batches_of, repeats_for, stage_of, step_of
from fastgan.training.compiling.captured_step import WARM_UP_STEPS, CapturedStep, unsupported_reason

CASES = [
    *(StepCase("pggan", px, "bf16") for px in (4, 64, 1024)),
    StepCase("wgan-gp", 64, "bf16"),
    StepCase("pggan", 64, "fp32"),
    StepCase("wgan-gp", 64, "fp32"),
]


def measure(case: StepCase, context: Context) -> dict[str, Any]:
    stage = stage_of(case, context)
    reason = unsupported_reason(stage)
    if reason is not None:
        return {"fault": reason}
    captured, batches = CapturedStep(stage), batches_of(stage)
    for _ in range(WARM_UP_STEPS + 2):
        captured.step(batches)
    if captured.refusal is not None:
        return {"fault": captured.refusal, "difference": captured.difference}

    def step() -> None:
        captured.step(batches)

    device, eager = context.device, step_of(stage_of(case, context))
    for _ in range(1 if context.rehearse else WARM_UP_STEPS):
        eager()
    repeats = repeats_for(step_ms(eager, device, 1), context.rehearse)
    times = {"eager_ms": step_ms(eager, device, repeats), "captured_ms": step_ms(step, device, repeats)}
    return {
        **case._asdict(),
        "difference": captured.difference,
        **times,
        "faster": times["eager_ms"] / times["captured_ms"],
        "eager_host_ms": host_ms(eager, device, min(repeats, 5)),
        "captured_host_ms": host_ms(step, device, min(repeats, 5)),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def run(context: Context) -> None:
    for case in [StepCase("wgan-gp", 8, "bf16", 4)] if context.rehearse else CASES:
        context.attempt(str(case), lambda case=case: measure(case, context))  # type: ignore[misc]
