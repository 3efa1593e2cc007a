"""Piece 4: implementations side by side in whole steps, and the scaled convolutions beside two steps of cuDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_pieces.context import Context, host_ms, replayed_us, step_ms
from benchmarks.gpu_pieces.steps import WARM_UP, StepCase, repeats_for, stage_of, step_of
from fastgan.ops import conv2d_downsample, upsample_conv2d
from fastgan.ops.dispatch.backend import OPS, use_backend

CASES = [StepCase("pggan", 64, "bf16"), StepCase("pggan", 1024, "bf16"), StepCase("pggan", 64, "tf32")]
FORMS = ("triton", "cuda", "torch")
# (channels in, channels out, px of the input of an upsampling, batch): PGGAN's levels.
CONVOLUTIONS = [(512, 512, 8, 16), (512, 256, 32, 16), (256, 128, 64, 16), (128, 64, 128, 16), (32, 16, 512, 4)]


def _able(form: str, context: Context) -> list[str]:
    """The ops that have a form on this machine."""
    x = torch.ones(2, 4, 8, 8, device=context.device)
    found = []
    for name, op in OPS.items():
        given = (x, x, x) if name == "scaled_dot_product_attention" else (x,)
        it = op.implementations.get(form)
        if it is not None and it.unsupported_reason(*given) is None:
            found.append(name)
    return found


def measure_step(case: StepCase, form: str, context: Context) -> dict[str, Any]:
    ops = _able(form, context)
    if not ops:
        return {"fault": f"no op has the form {form} here"}
    with use_backend(**dict.fromkeys(ops, form)):
        step = step_of(stage_of(case, context))
        for _ in range(1 if context.rehearse else WARM_UP):
            step()
        repeats = repeats_for(step_ms(step, context.device, 1), context.rehearse)
        whole, host = step_ms(step, context.device, repeats), host_ms(step, context.device, min(repeats, 5))
    return {**case._asdict(), "form": form, "ops": ops, "step_ms": whole, "host_ms": host}


def _second_order(call: Callable[..., torch.Tensor], x: torch.Tensor, w: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and second backward, nothing read back."""
    y = call(x, w)
    dy = torch.ones_like(y, requires_grad=True)

    def run() -> None:
        first = torch.autograd.grad(call(x, w), (x, w), dy, create_graph=True)
        torch.autograd.grad(first, (x, w, dy), [torch.ones_like(g) for g in first], allow_unused=True)

    return run


def measure_convolution(up: bool, shape: tuple[int, int, int, int], dtype: torch.dtype, context: Context) -> Any:
    channels, out, px, batch = shape
    device = context.device
    op = upsample_conv2d if up else conv2d_downsample
    if not up:
        channels, out, px = out, channels, 2 * px
    x = torch.randn(batch, channels, px, px, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(out, channels, 3, 3, device=device, dtype=dtype) / (3 * channels**0.5)
    x.requires_grad_()
    w.requires_grad_()
    able = [n for n, it in OPS[op.__name__].implementations.items() if it.unsupported_reason(x, w) is None]
    us = {
        form: replayed_us(_second_order(lambda x, w, form=form: op(x, w, backend=form), x, w), device) for form in able
    }
    return {"op": op.__name__, "shape": [batch, channels, out, px], "dtype": str(dtype), "us": us}


def run(context: Context) -> None:
    cases = [StepCase("pggan", 8, "fp32", 4)] if context.rehearse else CASES
    for case in cases[:1]:
        for form in ("cpp", "torch") if context.rehearse else FORMS:
            label = f"{case} {form}"
            context.attempt(label, lambda case=case, form=form: measure_step(case, form, context))  # type: ignore[misc]
    for dtype in (torch.float32,) if context.rehearse else (torch.bfloat16, torch.float32):
        for up in (True, False):
            for shape in [(4, 4, 4, 2)] if context.rehearse else CONVOLUTIONS:
                label = f"{'up' if up else 'down'} {shape} {dtype}"
                context.attempt(label, lambda up=up, s=shape, d=dtype: measure_convolution(up, s, d, context))  # type: ignore[misc]
    for case in cases[1:]:
        for form in FORMS:
            label = f"{case} {form}"
            context.attempt(label, lambda case=case, form=form: measure_step(case, form, context))  # type: ignore[misc]
