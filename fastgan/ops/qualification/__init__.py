"""Which implementation is right and fastest on this machine: measured once, and kept in the user's cache.

The first call of a class (`CallClass`: op, device, dtype, layout, size in powers of 4) that no earlier process has
measured compares each implementation with plain PyTorch (value, first and second derivatives, a small and an odd
shape), times them at the size of the call, and adds the class to the cache (`qualification_cache`). One that is wrong
is never used and is reported. The fastest of the others is the default; the choice of the shipped table
(`fastgan.ops.dispatch.backend`) stays unless another one takes less than 0.9 of its time.

Nothing is measured inside of tracing, a dispatch mode, a backward pass, forward mode or the capture of a graph. A class
that is first met there gets what the cache has, else the shipped table's choice, and keeps it: within a process a class
does not change, so that a run that is recorded can be repeated. `qualify_pending` measures what was put off.

    FASTGAN_QUALIFY=0      the shipped table, nothing is measured or read (tests run so)
    drawing.drawing()      the same for code that draws images on a CPU
    torch.use_deterministic_algorithms(True)      the shipped table, while it is set
    record(), adopt()      what a training run stores, and how a resumed run gets the same again
    follow()      a process that works for another one decides as that does, and measures nothing
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.dispatch import backend
from fastgan.ops.dispatch.backend import OPS, CallClass, Decision, Op, is_measurable
from fastgan.ops.dispatch.torch_private import current_backward, dispatch_modes, in_forward_mode
from fastgan.ops.qualification.cache import Store, Unwritable, machine
from fastgan.ops.qualification.cases import MEASURED_OPS
from fastgan.ops.qualification.measurement import DeviceBroken, Measurement, is_measuring, measure
from fastgan.utils.text import first_line

_BUSY_SECONDS = 3600.0  # until a class is measured again that other programs did not let be timed
_DETERMINISTIC = "deterministic algorithms"
_GAIN = 0.9  # another implementation than the shipped one takes less than this part of its time

_lock = threading.RLock()
_stores: dict[str, Store] = {}  # of each device
_recorded: dict[str, list[str] | None] = {}  # class -> what a resumed run used
_pending: dict[tuple[str, CallClass], tuple[Any, ...]] = {}  # classes that were met where nothing can be measured
_reported: set[str] = set()
_switched_off: str | None = None
_follows = False  # whether this process uses what others have measured, and measures nothing


def label_of(op: Op, key: CallClass) -> str:
    """Name of a class in files and tables: `conv2d cpu float32 contiguous 4^8 kernel=3 stride=1 pairs=4`."""
    layout = "contiguous" if key.contiguous else "strided"
    variant = (f"{name}={value}" for name, value in zip(op.variant, key.variant, strict=True))
    return " ".join(
        [op.name, key.device.type, str(key.dtype).removeprefix("torch."), layout, f"4^{key.size}", *variant]
    )


def mode() -> str | None:
    """Why nothing is measured in this process; None where it is.

    Raises:
        ValueError: FASTGAN_QUALIFY has another value than 0 or 1.
    """
    value = os.environ.get("FASTGAN_QUALIFY", "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTGAN_QUALIFY must be 0 or 1, got {value!r}")
    if value == "0":
        return "FASTGAN_QUALIFY=0"
    if torch.are_deterministic_algorithms_enabled():
        return _DETERMINISTIC
    return _switched_off


def configure(enabled: bool) -> None:
    """Measure in this process, or use the shipped table; forgets what this process has decided."""
    global _switched_off, _follows
    with _lock:
        _follows = False
        _switched_off = None if enabled else "switched off"
        _stores.clear()
        _recorded.clear()
        _pending.clear()
        _reported.clear()
        off = not enabled or os.environ.get("FASTGAN_QUALIFY", "").strip() == "0"
        backend.decide_with(None if off else _decide)


def _store(device: torch.device) -> Store:
    name = str(device)
    if name not in _stores:
        _stores[name] = Store(machine(device))
        note = _stores[name].note
        if note:
            _say(note)
        for label, entry in _stores[name].classes.items():
            _exclude(label, entry)
    return _stores[name]


def _say(line: str) -> None:
    """One line, once, on stderr."""
    if line not in _reported:
        _reported.add(line)
        print(f"fastgan: {line}", file=sys.stderr, flush=True)


def can_measure(inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether a measurement here and now would disturb nothing and would itself be undisturbed."""
    if _follows or is_measuring() or dispatch_modes() or in_forward_mode():
        return False
    if current_backward is None or current_backward() != -1:
        return False
    if any(x is not None and (not is_measurable(x) or not x.numel()) for x in inputs):
        return False
    return not (any(x is not None and x.is_cuda for x in inputs) and torch.cuda.is_current_stream_capturing())


def _decide(
    op: Op, key: CallClass, inputs: tuple[Tensor | None, ...], options: Mapping[str, object]
) -> Decision | None:
    """The decision for a class that this process meets for the first time."""
    if op.name not in MEASURED_OPS or is_measuring() or mode() is not None:
        return None
    with _lock:
        if key in op.decisions:  # another thread has met it meanwhile
            return op.decisions[key]
        label = label_of(op, key)
        if label in _recorded:
            order = _recorded[label]
            decision = None if order is None else _decision(op, order, {}, "as the run has it")
        else:
            decision = _known_or_measured(op, key, label, inputs, options)
        op.decisions[key] = decision
        return decision


def _known_or_measured(
    op: Op, key: CallClass, label: str, inputs: tuple[Tensor | None, ...], options: Mapping[str, object]
) -> Decision | None:
    store = _store(key.device)
    names = _candidates(op, key, inputs, options)
    entry = _usable(store, label, names)
    if entry is None and can_measure(inputs) and len(names) > 1:
        entry = _measured(store, op, key, label, inputs, options, names)
    elif entry is None and len(names) > 1 and all(x is None or x.numel() for x in inputs):
        shapes = tuple(None if x is None else (x.shape, x.is_contiguous()) for x in inputs)
        _pending[op.name, key] = (shapes, dict(options))
    return None if entry is None else _decision(op, entry["order"], entry["forms"], entry["why"])


def _candidates(op: Op, key: CallClass, inputs: tuple[Tensor | None, ...], options: Mapping[str, object]) -> list[str]:
    """Implementations that can run a call and were not wrong here."""
    return [
        name
        for name, it in op.implementations.items()
        if it.unsupported_reason(*inputs, **options) is None and (key.device.type, key.dtype, name) not in op.wrong
    ]


def _usable(store: Store, label: str, names: list[str]) -> dict[str, Any] | None:
    """The entry of a class, if it knows every implementation that can run the call, and all could be timed."""
    entry = store.classes.get(label)
    if entry is None or not set(names) <= set(entry["forms"]) or entry.get("until", math.inf) < time.time():
        return None
    return entry


def _measured(
    store: Store,
    op: Op,
    key: CallClass,
    label: str,
    inputs: tuple[Tensor | None, ...],
    options: Mapping[str, object],
    names: list[str],
) -> dict[str, Any] | None:
    """The entry of a class, measured by this process or by one that had the lock before it."""
    try:
        with store.locked():
            entry = _usable(store, label, names)
            if entry is None:
                entry = _entry(store, op, key, inputs, options, names)
                _exclude_and_report(label, entry)
                store.add(label, entry)
    except Unwritable as why:
        ranks = int(os.environ.get("WORLD_SIZE") or 1) > 1
        _say(f"{why}: {'the shipped table decides, as ranks must agree' if ranks else 'what is measured is not kept'}")
        if ranks:
            return None
        entry = store.classes.get(label) or _entry(store, op, key, inputs, options, names)
        store.classes[label] = entry
        _exclude_and_report(label, entry)
    except Exception as error:  # a measurement that fails must not end a run
        reason = f"{type(error).__name__}: {first_line(error)}"
        _say(f"{label} could not be measured, and the shipped table decides ({reason})")
        return None
    _require_device(op, entry)
    return entry


def _require_device(op: Op, entry: Mapping[str, Any]) -> None:
    """Raise if the measurement has left the GPU unusable."""
    if not entry["order"]:
        broken = next(f"{name}: {it['wrong']}" for name, it in entry["forms"].items() if it.get("wrong"))
        raise RuntimeError(
            f"{op.name} ({broken}) has left the GPU unusable for this process; it is noted and will not be used again: "
            "start again"
        )


def _entry(
    store: Store,
    op: Op,
    key: CallClass,
    inputs: tuple[Tensor | None, ...],
    options: Mapping[str, object],
    names: list[str],
) -> dict[str, Any]:
    """Measure a class; plain values, as the cache keeps them. What an earlier process found to be wrong stays so."""
    before = store.classes.get(label_of(op, key), {"forms": {}})["forms"]
    wrong = {name: it for name, it in before.items() if it.get("wrong")}
    first = inputs[0]
    assert first is not None
    try:
        found = _found(op, key, inputs, options, names)
    except DeviceBroken as broken:
        wrong[broken.name] = _plain(Measurement(math.inf, wrong=str(broken)))
        return {"order": [], "why": "the GPU was left unusable", "shape": list(first.shape), "forms": wrong}
    order, why = choose_from(found, op.shipped(*inputs, **options))
    forms = {**wrong, **{name: _plain(it) for name, it in found.items()}}
    entry: dict[str, Any] = {"order": order, "why": why, "shape": list(first.shape), "forms": forms}
    if any(it.device_us == math.inf or it.host_us == math.inf for it in found.values()):
        entry["until"] = time.time() + _BUSY_SECONDS
        _say(
            "other programs disturbed the timing of some ops, which take their usual forms for an hour (no fault; "
            "--no-qualify does that for all)"
        )
    return entry


def _found(
    op: Op, key: CallClass, inputs: tuple[Tensor | None, ...], options: Mapping[str, object], names: list[str]
) -> dict[str, Measurement]:
    """What is measured; twice where it speaks against the shipped table, the least times of both."""
    found = measure(op, key, inputs, options, names)
    shipped = op.shipped(*inputs, **options)
    if shipped not in found or found[shipped].wrong or choose_from(found, shipped)[0][0] == shipped:
        return found
    again = measure(op, key, inputs, options, names)
    return {name: min(it, again[name], key=lambda m: (m.wrong is None, m.cost)) for name, it in found.items()}


def _plain(measurement: Measurement) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(measurement).items()
    }


def choose_from(found: Mapping[str, Measurement], shipped: str) -> tuple[list[str], str]:
    """The right implementations, the default first, and why it is that.

    One that sends zeros back in second order, which costs the layers before it time that is not in its own, comes after
    those that send none.

    Args:
        found: what was measured, by implementation.
        shipped: the choice of the shipped table.
    """
    right = {name: it.cost for name, it in found.items() if it.wrong is None}
    order = sorted(right, key=lambda name: (found[name].zeros, right[name], backend.PREFERENCE.index(name)))
    if shipped not in right:
        return order, "the fastest"
    if right[shipped] == math.inf:
        return sorted(order, key=lambda name: name != shipped), "the shipped choice, which could not be timed"
    if found[order[0]].zeros < found[shipped].zeros:
        return order, f"{shipped}, the shipped choice, sends zeros back in second order"
    ratio = right[shipped] / right[order[0]]
    if order[0] != shipped and ratio > 1 / _GAIN:
        return order, f"{ratio:.2f} times as fast as {shipped}, the shipped choice"
    if order[0] == shipped:
        return order, "the shipped choice and the fastest"
    why = f"the shipped choice; {order[0]} is only {ratio:.2f} times as fast"
    return [shipped, *(name for name in order if name != shipped)], why


def _decision(op: Op, order: list[str], forms: Mapping[str, Any], why: str) -> Decision | None:
    known = [name for name in order if name in op.implementations]
    if not known:
        return None
    reasons = {}
    for name, it in forms.items():
        if it.get("wrong"):
            reasons[name] = f"it is wrong on this machine: {it['wrong']}"
        elif it.get("device_us") is not None:
            reasons[name] = f"{it['device_us']:.0f} us here; {known[0]} is {why}"
    return Decision(tuple((name, op.implementations[name]) for name in known), MappingProxyType(reasons))


def _exclude(label: str, entry: Mapping[str, Any]) -> list[str]:
    """Take implementations that were wrong from the shipped table too; their names."""
    name, device, dtype = label.split(" ", 3)[:3]
    wrong = [form for form, it in entry["forms"].items() if it.get("wrong")]
    if name in OPS:
        OPS[name].wrong.update((device, getattr(torch, dtype), form) for form in wrong)
    return wrong


def _exclude_and_report(label: str, entry: Mapping[str, Any]) -> None:
    for form in _exclude(label, entry):
        reason = entry["forms"][form]["wrong"]
        op = label.split(" ", 1)[0]
        _say(
            f"{op}: {form} is wrong on this machine and is not used ({reason}); "
            "please report it with the output of `fastgan doctor --qualify`"
        )


def exclude_known(device: torch.device) -> None:
    """Take what was found to be wrong on this machine from the shipped table, where that decides."""
    if mode() in (None, _DETERMINISTIC):
        with _lock:
            _store(device)


def known(device: torch.device) -> set[str]:
    """Labels of the classes that were measured on this machine, all their timings undisturbed."""
    return {label for label, entry in _store(device).classes.items() if "until" not in entry}


def qualify(
    name: str, inputs: tuple[Tensor | None, ...], options: Mapping[str, object], anew: bool = True
) -> tuple[str, dict[str, Any]]:
    """Measure the class of a call, and use it from now on.

    Args:
        name: of the op.
        inputs, options: of the call, as `Op.choose` gets them.
        anew: also where the class is known and its timings were undisturbed.

    Returns:
        Label of the class, and its entry in the cache: "order", "why", "shape" and "forms", as `Measurement`.

    Raises:
        Unwritable: the cache cannot be written.
    """
    op = OPS[name]
    key = op.class_of(*inputs, **options)
    assert key is not None
    label, store = label_of(op, key), _store(key.device)
    with _lock, store.locked():
        names = _candidates(op, key, inputs, options)
        entry = None if anew else _usable(store, label, names)
        if entry is None or "until" in entry:
            entry = _entry(store, op, key, inputs, options, names)
            _exclude_and_report(label, entry)
            store.add(label, entry)
        op.decisions[key] = _decision(op, entry["order"], entry["forms"], entry["why"])
        op.native_calls.clear()
    _require_device(op, entry)
    return label, entry


def pending() -> int:
    """Classes that were met where nothing can be measured, and run by the shipped table in this process."""
    return len(_pending)


def qualify_pending() -> int:
    """Measure what was put off, and use it from now on: what was traced or captured before has to be made anew.

    Returns:
        The number of classes that were measured.
    """
    with _lock:
        left = list(_pending.items())
        for (name, key), (shapes, options) in left:
            inputs = tuple(
                None
                if it is None
                else torch.empty(it[0], dtype=key.dtype, device=key.device).contiguous(
                    memory_format=torch.contiguous_format if it[1] or len(it[0]) != 4 else torch.channels_last
                )
                for it in shapes
            )
            if not can_measure(inputs):
                break
            del _pending[name, key]
            OPS[name].decisions.pop(key, None)
            _decide(OPS[name], key, inputs, options)
        return len(left) - len(_pending)


def _is_order(order: Any) -> bool:
    return order is None or (isinstance(order, list) and all(isinstance(name, str) for name in order))


# --- what a run stores -----------------------------------------------------------------------------------------------


def record(device: torch.device) -> dict[str, Any]:
    """What this process has decided so far, plain values: for the checkpoint of a run on `device`."""
    off = mode()
    if off is not None:
        return {"shipped": off, "machine": machine(device), "classes": {}}
    classes: dict[str, list[str] | None] = dict(_recorded)
    for op in OPS.values():
        for key, decision in op.decisions.items():
            if key[0].type == device.type:  # type: ignore[attr-defined]
                names = None if decision is None else [name for name, _ in decision.candidates]
                classes[label_of(op, CallClass(*key))] = names  # type: ignore[arg-type]
    return {"shipped": None, "machine": machine(device), "classes": classes}


def conflict(records: Sequence[Mapping[str, Any]]) -> str | None:
    """One line about a class that ranks decide differently, as they may where hosts share no cache; else None.

    Args:
        records: what `record` returned on each rank.
    """
    seen: dict[str, tuple[int, Any]] = {}
    for rank, stored in enumerate(records):
        for label, order in stored["classes"].items():
            first, others = seen.setdefault(label, (rank, order))
            if (others or [None])[0] != (order or [None])[0]:
                one, two = (it[0] if it else "the shipped one" for it in (others, order))
                choices = f"rank {first} chose {one}, rank {rank} {two}"
                return f"ranks differ in the implementation of {label}: {choices}; a resume takes rank 0's everywhere"
    return None


def adopt(stored: Mapping[str, Any] | None, device: torch.device) -> str | None:
    """Use what a run used, where it was recorded on a machine like this one; the other classes are measured as usual.

    Args:
        stored: as from `record`; None, from a version without it, changes nothing.
        device: of the run.

    Returns:
        One line about what differs; None where nothing does.
    """
    off = mode()
    exclude_known(device)
    if not stored:
        return None
    here, there = machine(device), stored.get("machine", {})
    differs = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    was_off = stored.get("shipped")
    if differs:
        what = ", ".join(f"{name} {here.get(name)}, not {there.get(name)}" for name in differs)
        return f"implementations are chosen anew for this machine, and results may differ by rounding: {what}"
    if off is not None and was_off is None:
        return f"the run chose its implementations by measurement; now the shipped table decides ({off})"
    if off is None and was_off is not None:
        configure(False)
        return f"the shipped table decides, as in the run so far ({was_off})"
    if off is None:
        with _lock:
            _recorded.update({label: order for label, order in stored["classes"].items() if _is_order(order)})
            for op in OPS.values():
                op.decisions.clear()
    return None


def follow(stored: Mapping[str, Any], device: torch.device) -> None:
    """Decide from now on as the process does that made `stored`, on this machine; measure nothing.

    Args:
        stored: as from `record`.
        device: of what runs in this process.
    """
    global _follows
    _follows = True
    adopt(stored, device)


def forms_of_recordings(device: torch.device) -> dict[str, list[str]]:
    """What decides, besides the call, which implementation runs under `backend.recorded_forms`: plain values, by op."""
    exclude_known(device)
    found = {}
    for op in OPS.values():
        names = [name for name in op.recordable() if op.implementations[name].device in (None, device.type)]
        can = [name for name in names if op.implementations[name].unsupported_reason() is None]
        wrong = [f"{name} is wrong in {dtype}" for kind, dtype, name in op.wrong if kind == device.type]
        found[op.name] = [*can, *sorted(wrong)]
    return found
