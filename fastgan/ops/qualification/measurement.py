"""Comparison of an implementation with plain PyTorch, and its times.

Everything runs in a thread of its own: a new thread has no autograd mode, autocast, stream, saved-tensor hooks or
dispatch mode of the caller, so nothing of those is used or changed; random numbers come from a generator of their own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastgan.ops.dispatch.backend import CallClass, Op
from fastgan.ops.qualification.cases import Case, Cases, cases_of
from fastgan.utils.text import first_line

_SECONDS = 0.15  # for the timed rounds of all implementations of a class; one round takes place in any case
_T = TypeVar("_T")

_here = threading.local()


def is_measuring() -> bool:
    """Whether this thread is one that measures: ops that others call take what is known."""
    return getattr(_here, "measuring", False)


@dataclass(frozen=True)
class Measurement:
    """One implementation of an op for one class of calls.

    Attributes:
        error: largest root mean square error of a result or derivative, relative to its size; infinite for a NaN.
        plain_error: that of plain PyTorch in the same dtype.
        wrong: why it is wrong; None when it is right.
        zeros: second derivatives that it returns though they are zero: other layers then compute with them.
        device_us: time of forward, backward and second backward on the device, in microseconds; None where it was not
            timed, infinite where other programs did not let it.
        host_us: time of the same on the host, in microseconds.
    """

    error: float = 0.0
    plain_error: float = 0.0
    wrong: str | None = None
    zeros: int = 0
    device_us: float | None = None
    host_us: float | None = None

    @property
    def cost(self) -> float:
        """What decides, in microseconds: the slower of device and host, which work side by side on a GPU."""
        return math.inf if self.device_us is None or self.host_us is None else max(self.device_us, self.host_us)


def in_thread(work: Callable[[], _T]) -> _T:
    """The result of `work` in a new thread."""
    results: list[Any] = []

    def run() -> None:
        _here.measuring = True
        try:
            results.append((work(), None))
        except BaseException as error:  # raised again in the caller's thread
            results.append((None, error))

    thread = threading.Thread(target=run, name="fastgan-qualification", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:  # an interrupt: a process that ends while torch computes in a thread is aborted
        thread.join()
        raise
    result, error = results[0]
    if error is not None:
        raise error
    return result


def measure(
    op: Op, key: CallClass, inputs: tuple[Tensor | None, ...], options: Any, names: Sequence[str]
) -> dict[str, Measurement]:
    """Implementation -> what it was found to be, for those of `names` that can run the calls of a class.

    Args:
        op: the op.
        key: the class.
        inputs, options: of one call of the class, as `Op.choose` gets them; only shapes and layout are read.
        names: implementations, plain PyTorch among them.
    """
    return in_thread(lambda: _measure(op, key, cases_of(op.name, key, inputs, options), names))


def _measure(op: Op, key: CallClass, cases: Cases, names: Sequence[str]) -> dict[str, Measurement]:
    device = key.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)  # the work of the caller's streams would be in the times
    oracles = _oracles(key, cases)
    found = {name: _compare(op, key, oracles, name) for name in names}
    times = _times(op, key, cases, [name for name, it in found.items() if it.wrong is None])
    return {
        name: Measurement(it.error, it.plain_error, it.wrong, it.zeros, *times.get(name, (None, None)))
        for name, it in found.items()
    }


# --- values ----------------------------------------------------------------------------------------------------------


def derivatives(call: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Value, first derivatives and second derivatives, with fixed random cotangents; None where there is none."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y = call(*leaves)
    dy = _cotangent(y, 1).requires_grad_()
    given = [x for x in leaves if x is not None]
    first = torch.autograd.grad(y, given, dy, create_graph=True, allow_unused=True)
    tracked = [(g, _cotangent(g, 2 + i)) for i, g in enumerate(first) if g is not None and g.requires_grad]
    if not tracked:
        return [y, *first, *[None] * (len(given) + 1)]
    gs, us = zip(*tracked, strict=True)
    second = torch.autograd.grad(gs, [*given, dy], us, allow_unused=True)
    return [y, *first, *second]


def _cotangent(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(like.shape, generator=generator, device="cpu").to(torch.bfloat16)  # the same in every dtype
    return torch.empty_like(like, requires_grad=False).copy_(values)


def _rms(x: Tensor) -> float:
    value = x.detach().double().square().mean().sqrt().item() if x.numel() else 0.0
    return math.inf if math.isnan(value) else value


def _relative_error(ours: Tensor | None, exact: Tensor | None, scale: float) -> float:
    """Root mean square error over that of the exact result, or over `scale` where that is zero up to rounding."""
    if exact is None:
        return 0.0 if ours is None else _rms(ours) / scale
    size = _rms(exact)
    if ours is None:
        return 0.0 if size <= 1e-12 * scale else 1.0
    if ours.shape != exact.shape:
        return math.inf
    return _rms(ours.double() - exact) / (scale if size <= 1e-12 * scale else size)


class _Oracle(NamedTuple):
    """One case, computed by plain PyTorch.

    Attributes:
        label: "small" or "odd".
        case, tensors: the call.
        exact: value and derivatives in float64.
        scale: the largest root mean square of those.
        errors: of plain PyTorch in the dtype at hand.
    """

    label: str
    case: Case
    tensors: list[Tensor | None]
    exact: list[Tensor | None]
    scale: float
    errors: list[float]


def _oracles(key: CallClass, cases: Cases) -> list[_Oracle]:
    made = []
    for label, case in (("small", cases.small), ("odd", cases.odd)):
        tensors = cases.tensors(case, key.dtype, key.device)
        exact = derivatives(partial(case.call, "torch"), [None if x is None else x.double() for x in tensors])
        plain = derivatives(partial(case.call, "torch"), tensors)
        scale = max((_rms(x) for x in exact if x is not None), default=0.0) or 1.0
        errors = [_relative_error(p, e, scale) for p, e in zip(plain, exact, strict=True)]
        made.append(_Oracle(label, case, tensors, exact, scale, errors))
    return made


def _compare(op: Op, key: CallClass, oracles: Sequence[_Oracle], name: str) -> Measurement:
    """Errors on a small and an odd shape, against plain PyTorch in float64.

    An error may be twice that of plain PyTorch in the same dtype, plus eight roundings.
    """
    worst, zeros, wrong = 0.0, 0, None
    worst_plain = max(error for it in oracles for error in it.errors)
    for label, case, tensors, exact, scale, errors in oracles:
        if op.implementations[name].unsupported_reason(*tensors, **case.options) is not None:
            continue
        try:
            ours = derivatives(partial(case.call, name), tensors)
        except torch.OutOfMemoryError:
            continue
        except Exception as error:
            return Measurement(math.inf, worst_plain, _failure(key, name, label, error))
        given = sum(x is not None for x in tensors)
        for i, (a, e, theirs) in enumerate(zip(ours, exact, errors, strict=True)):
            mine = _relative_error(a, e, scale)
            worst = max(worst, mine)
            if not mine <= 2 * theirs + 8 * torch.finfo(key.dtype).eps and wrong is None:
                what = "its result" if i == 0 else f"a {'first' if i <= given else 'second'} derivative"
                wrong = f"error {mine:.1e} in {what}, {label} shape, where plain PyTorch has {theirs:.1e}"
        zeros = sum(x is not None and not x.any() for x in ours)
    return Measurement(worst, worst_plain, wrong, zeros)


def _failure(key: CallClass, name: str, label: str, error: Exception) -> str:
    """One line of an exception. Raises where it has broken the device for this process."""
    reason = f"{type(error).__name__} on the {label} shape: {first_line(error)}"
    if key.device.type == "cuda":
        try:
            torch.cuda.synchronize(key.device)
        except RuntimeError as broken:
            raise DeviceBroken(name, reason) from broken
    return reason


class DeviceBroken(RuntimeError):
    """Implementation `name` has left the GPU unusable for this process; the message is why it is wrong."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


# --- times -----------------------------------------------------------------------------------------------------------


def _times(op: Op, key: CallClass, cases: Cases, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Implementation -> microseconds of forward and both backward passes on the device and on the host."""
    timer = _times_on_gpu if key.device.type == "cuda" else _times_on_cpu
    tensors = cases.tensors(cases.timed, key.dtype, key.device)
    runs = {}
    for name in names:
        if op.implementations[name].unsupported_reason(*tensors, **cases.timed.options) is not None:
            continue
        try:
            runs[name] = _pass(cases.timed, name, tensors)
            runs[name]()
        except torch.OutOfMemoryError:
            runs.pop(name, None)
    if not runs:
        return {}
    small = cases.tensors(cases.small, key.dtype, key.device)
    hosts = {name: _pass(cases.small, name, small) for name in runs}
    try:
        return timer(runs, hosts)
    except torch.OutOfMemoryError:
        return {}


def _pass(case: Case, name: str, tensors: Sequence[Tensor | None]) -> Callable[[], None]:
    """Forward, backward and second backward of one call, nothing read back and no random number drawn."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    given = [x for x in leaves if x is not None]
    cotangents: list[Tensor] = []

    def run() -> None:
        y = case.call(name, *leaves)
        if not cotangents:
            cotangents.append(torch.ones_like(y, requires_grad=True))
        first = torch.autograd.grad(y, given, cotangents[0], create_graph=True, allow_unused=True)
        tracked = [(g, x.detach()) for g, x in zip(first, given, strict=True) if g is not None and g.requires_grad]
        if tracked:
            gs, us = zip(*tracked, strict=True)
            torch.autograd.grad(gs, [*given, cotangents[0]], us, allow_unused=True)

    return run


def _rounds(runs: dict[str, Callable[[], float]], seconds: float = _SECONDS) -> dict[str, float]:
    """The least of the values of each, in rounds that take turns: what else the machine does only adds.

    One that has had its share of the time and takes more than twice as long as another has no more rounds.
    """
    begin = time.perf_counter()
    least, spent, left = dict.fromkeys(runs, math.inf), dict.fromkeys(runs, 0.0), list(runs)
    for i in range(200):
        for name in left:
            began = time.perf_counter()
            least[name] = min(least[name], runs[name]())
            spent[name] += time.perf_counter() - began
        left = [name for name in left if spent[name] < seconds / 2 or least[name] <= 2 * min(least.values())]
        if i >= 2 and time.perf_counter() - begin > seconds:
            break
    return least


def interruptions() -> int:
    """How often the system has taken a core from a thread of this process for another one; 0 where it does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _clock(run: Callable[[], None], repeats: int = 1) -> Callable[[], float]:
    """Seconds of one run; infinite where it was interrupted more than 20 times a second.

    On a busy machine threads wait for one that has no core, and a run of 0.1 ms takes 60 ms, each time.
    """

    def timed() -> float:
        before, began = interruptions(), time.perf_counter()
        for _ in range(repeats):
            run()
        seconds = time.perf_counter() - began
        return seconds / repeats if interruptions() - before <= 20 * seconds else math.inf

    return timed


def _times_on_cpu(
    runs: dict[str, Callable[[], None]], hosts: dict[str, Callable[[], None]]
) -> dict[str, tuple[float, float]]:
    """Wall clock; that of the small shape is the host's part of it."""
    times = _rounds({name: _clock(run) for name, run in runs.items()})
    overheads = _rounds({name: _clock(run) for name, run in hosts.items()}, seconds=0.02)
    return {name: (times[name] * 1e6, min(overheads[name], times[name]) * 1e6) for name in runs}


def _times_on_gpu(
    runs: dict[str, Callable[[], None]], hosts: dict[str, Callable[[], None]]
) -> dict[str, tuple[float, float]]:
    """Replay of a graph between two events, or the calls themselves where they cannot be captured; host apart."""
    replays = {name: _replay(run) for name, run in runs.items()}

    def device(run: Callable[[], None]) -> Callable[[], float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def timed() -> float:
            begin.record()
            for _ in range(3):
                run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 3e3

        return timed

    def host(run: Callable[[], None]) -> Callable[[], float]:
        clock = _clock(run, 5)

        def timed() -> float:
            torch.cuda.synchronize()
            return clock()

        return timed

    times = _rounds({name: device(run) for name, run in replays.items()})
    overheads = _rounds({name: host(run) for name, run in hosts.items()}, seconds=0.05)
    torch.cuda.synchronize()
    return {name: (times[name] * 1e6, overheads[name] * 1e6) for name in runs}


def _replay(run: Callable[[], None]) -> Callable[[], None]:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):  # allocations and choices of cuDNN come before a capture
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay
