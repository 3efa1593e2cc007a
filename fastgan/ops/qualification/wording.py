"""What is said about which implementations run: one line, the same in a run's log and in `fastgan doctor`."""

from __future__ import annotations

import torch

from fastgan.ops import qualification


def of_process(device: torch.device) -> str:
    """How the classes of calls that this process has met on `device` were decided."""
    found = qualification.record(device)["classes"].values()
    measured = sum(order is not None for order in found)
    return _line(measured, str(len(found) - measured))


def of_machine(device: torch.device) -> str:
    """How the classes of calls that a process may meet on `device` are decided."""
    return _line(0 if qualification.mode() else len(qualification.known(device)), "all others")


def _line(measured: int, rest: str) -> str:
    off = qualification.mode()
    if off is not None:
        return f"implementations: all by the shipped table ({off})"
    return f"implementations: {measured} classes of calls by measurement, {rest} by the shipped table"
