"""Which precision `--precision auto` takes, as a pure function of what the devices can do and of the variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastgan.config import Config, Precision, replace
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.utils.system import cpu_flags

QUALIFIED_FOR_BF16: frozenset[str] = frozenset()
"""Variants that end as good in bf16 as in fp32: see `benchmarks/studies/precision_quality.py`, whose rule decides."""

# Names in /proc/cpuinfo, on x86 and on Arm, of instructions that multiply bfloat16.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class DeviceFacts:
    """What decides about precision on a device.

    Attributes:
        kind: "cpu", "cuda" or "mps".
        bf16: whether it has instructions that multiply bfloat16.
        tf32: whether it has TF32.
    """

    kind: str
    bf16: bool
    tf32: bool

    @staticmethod
    def of(device: torch.device) -> DeviceFacts:
        """Those of a device of this machine."""
        if device.type == "cuda":
            # Ampere brought both. Before it torch emulates bfloat16, slower than float32.
            recent = torch.cuda.get_device_capability(device) >= (8, 0)
            return DeviceFacts("cuda", bf16=recent, tf32=recent)
        return DeviceFacts(device.type, bf16=device.type == "cpu" and bool(_BF16_FLAGS & cpu_flags()), tf32=False)

    @staticmethod
    def common(ranks: Sequence[DeviceFacts]) -> DeviceFacts:
        """What the devices of all ranks can do."""
        return DeviceFacts(ranks[0].kind, bf16=all(f.bf16 for f in ranks), tf32=all(f.tf32 for f in ranks))


def choose(facts: DeviceFacts, variant: str, qualified: frozenset[str] = QUALIFIED_FOR_BF16) -> tuple[Precision, str]:
    """What "auto" is for a variant on such devices, and why."""
    if facts.kind == "mps":
        return "fp32", "on mps nothing else is offered"
    device = "GPU" if facts.kind == "cuda" else "CPU"
    if facts.bf16 and variant in qualified:
        return "bf16", f"this {device} multiplies bfloat16, and {variant} ends as well with it"
    why_not = f"that {variant} ends as well in bf16 is not shown yet"
    if not facts.bf16:
        why_not = f"this {device} has no bfloat16"
    if facts.tf32:
        return "tf32", f"this GPU has TF32, and {why_not}"
    return "fp32", f"{why_not}, nor TF32" if facts.kind == "cuda" and not facts.bf16 else why_not


def _remark(precision: Precision, facts: DeviceFacts) -> str:
    """What a user should know about a precision that was configured on such devices."""
    if precision == "tf32" and not facts.tf32:
        return "as configured; without a GPU that has TF32 it is fp32"
    if precision == "bf16" and not facts.bf16:
        return "as configured; without instructions for bfloat16 it is slower than fp32"
    return "as configured"


def resolve(config: Config, variant: str, world: ProcessGroup) -> tuple[Config, str]:
    """`config` with a precision in place of "auto", the same on all ranks; a collective.

    Returns:
        The configuration, and one line about the precision for the log.
    """
    facts = DeviceFacts.common(world.gather(DeviceFacts.of(world.device)))
    if config.system.precision != "auto":
        precision = config.system.precision
        return config, f"precision {precision} ({_remark(precision, facts)})"
    precision, reason = choose(facts, variant)
    return replace(config, system={"precision": precision}), f"precision {precision} (auto: {reason})"
