"""Implementations are compared and timed on the machine they run on, once, and what is wrong is never used."""

from __future__ import annotations

import errno
import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernelcases import random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan import ops
from fastgan.ops import attention_chunked, backend, qualification, qualification_cache, qualification_measure
from fastgan.ops.backend import OPS, CallClass
from fastgan.ops.qualification_cases import MEASURED_OPS
from fastgan.ops.qualification_measure import Measurement, measure

ROOT = Path(ops.__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Measurements are on, in a cache of the test's own; the folder of that cache."""
    ops.backends("pixel_norm", torch.zeros(2, 3))  # the C++ library comes from the usual cache
    environment = dict(os.environ)
    os.environ.pop("FASTGAN_QUALIFY", None)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    monkeypatch.setattr(qualification_measure, "_SECONDS", 0.01)
    monkeypatch.setattr(qualification_measure, "interruptions", lambda: 0)
    qualification.configure(enabled=True)
    yield tmp_path / "fastgan" / "qualification"
    os.environ.clear()
    os.environ.update(environment)
    qualification.configure(enabled=True)


@pytest.fixture
def calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that were measured, one entry for each time."""
    measured: list[str] = []

    def counted(op: Any, *arguments: Any) -> dict[str, Measurement]:
        measured.append(op.name)
        return measure(op, *arguments)

    monkeypatch.setattr(qualification, "measure", counted)
    return measured


def anew() -> None:
    """As a new process: nothing is known but what is in the cache."""
    qualification.configure(enabled=True)


def without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qualification_measure, "_times", lambda op, key, cases, names: dict.fromkeys(names, (1.0, 1.0)))


def with_times(monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
    """Microseconds of each implementation, in place of a clock."""
    monkeypatch.setattr(
        qualification_measure, "_times", lambda op, key, cases, names: {n: (times[n], 1.0) for n in names if n in times}
    )


def entry(folder: Path) -> dict[str, Any]:
    """The one class in the cache."""
    (file,) = folder.glob("*.json")
    (found,) = json.loads(file.read_text())["classes"].values()
    return dict(found)


# --- the first call --------------------------------------------------------------------------------------------------


def test_first_call_of_a_class_measures_and_later_processes_read(calls: list[str], folder: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by the shipped table")
    assert calls == []  # a question measures nothing
    ops.pixel_norm(x)
    ops.pixel_norm(torch.randn(2, 3, 5, 5))  # the same class
    assert calls == ["pixel_norm"]
    first, why = next(iter(ops.backends("pixel_norm", x).items()))
    assert why.endswith("; chosen here by measurement")
    found = entry(folder)
    assert found["order"][0] == first and found["shape"] == [2, 3, 4, 4]
    times = [it["device_us"] for it in found["forms"].values()]
    assert all(it["error"] < 1e-5 and it["wrong"] is None and it["host_us"] > 0 for it in found["forms"].values())
    assert all(0 < us < 1e6 for us in times)
    anew()
    ops.pixel_norm(x)
    assert calls == ["pixel_norm"]
    ops.pixel_norm(torch.randn(64, 3, 40, 40))  # a larger class
    ops.pixel_norm(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert calls == ["pixel_norm"] * 3
    assert not list(folder.glob(".*"))  # no partial files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MEASURED_OPS)
def test_every_implementation_is_right_here(
    name: str, layout: torch.memory_format, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_times(monkeypatch)
    x, w, bias = torch.randn(4, 6, 8, 8).to(dtype, memory_format=layout), torch.randn(6, 6, 3, 3), torch.randn(6)
    inputs: tuple[Any, ...] = (x,)
    options: dict[str, Any] = {}
    if name == "scaled_dot_product_attention":
        inputs = (x[:, :, 0], x[:, :, 1], x[:, :, 2])
    elif "conv" in name:
        inputs = (x, w.to(dtype), bias.to(dtype))[: 2 if name in ("conv2d", "conv_transpose2d") else 3]
        options = {"act": 2, "negative_slope": 0.2, "gain": 1.5} if len(inputs) == 3 else {}
    elif "bias" in name:
        inputs, options = (x, bias), {"act": 2, "negative_slope": 0.2, "gain": 1.5}
    elif name == "avg_pool2d":
        options = {"kernel_size": 2}
    op = OPS[name]
    names = [n for n, it in op.implementations.items() if it.unsupported_reason(*inputs, **options) is None]
    found = measure(op, CallClass(*op.classify(*inputs, **options)), inputs, options, names)
    assert set(found) == set(names) and "torch" in found
    for form, it in found.items():
        assert it.wrong is None, f"{form}: {it}"
        assert 0 < it.error < 100 * torch.finfo(dtype).eps


def test_sizes_fall_into_few_classes() -> None:
    assert [backend.size_class(n) for n in (0, 1, 4**5, 4**5 + 1, 4**6, 4**8 + 1, 4**11, 4**14)] == [
        *(5, 5, 5, 6, 6, 9, 11, 11)
    ]


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_fastest_right_one_is_chosen_and_the_shipped_one_unless_beaten_by_a_tenth() -> None:
    def of(**times: float) -> dict[str, Measurement]:
        return {name: Measurement(device_us=us, host_us=1.0) for name, us in times.items()}

    assert qualification.choose_from(of(cpp=80, torch=100), "torch") == (
        ["cpp", "torch"],
        "1.25 times as fast as torch, the shipped choice",
    )
    assert qualification.choose_from(of(cpp=95, torch=100), "torch")[0] == ["torch", "cpp"]
    assert qualification.choose_from(of(cpp=95, torch=100), "cpp")[0] == ["cpp", "torch"]
    wrong = {**of(torch=100, cpp=50), "lean": Measurement(wrong="it is", device_us=1.0, host_us=1.0)}
    assert qualification.choose_from(wrong, "lean")[0] == ["cpp", "torch"]
    host = {"triton": Measurement(device_us=5.0, host_us=90.0), "torch": Measurement(device_us=40.0, host_us=30.0)}
    assert qualification.choose_from(host, "triton")[0] == ["torch", "triton"]  # the host holds the device up
    untimed = {"cpp": Measurement(), "torch": Measurement()}
    assert qualification.choose_from(untimed, "torch")[0] == ["torch", "cpp"]


def test_zeros_that_are_sent_back_count_against_an_implementation(folder: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    found = measure(OPS["bias_act"], CallClass(*OPS["bias_act"].classify(x)), (x,), {"act": 1}, ["lean", "torch"])
    assert (found["lean"].zeros, found["torch"].zeros) == (0, 1)
    slower = {
        "lean": Measurement(device_us=9.0, host_us=1.0),
        "torch": Measurement(zeros=1, device_us=1.0, host_us=1.0),
    }
    assert qualification.choose_from(slower, "lean")[0] == ["lean", "torch"]


def test_wrong_implementation_is_never_used_and_is_reported_once(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    module = importlib.import_module("fastgan.ops.bias_act")
    right = module.PYTORCH_KERNELS.bias_act_backward

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        dx, db = right(*arguments)
        return dx * 1.001, db

    monkeypatch.setattr(module.PYTORCH_KERNELS, "bias_act_backward", wrong)
    with_times(monkeypatch, lean=1.0, cpp=50.0, native=50.0, torch=100.0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)  # "lean" is the shipped choice: kernels have no float64
    assert OPS["bias_act"].shipped(x) == "lean"
    for _ in range(3):
        torch.testing.assert_close(ops.bias_act(x), torch.nn.functional.leaky_relu(x, 0.2))
    lines = [line for line in capfd.readouterr().err.splitlines() if "fastgan:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("fastgan: bias_act: lean is wrong on this machine and is not used (error 1.0e-03 in a ")
    assert "`fastgan doctor --qualify`" in lines[0]
    assert next(iter(ops.backends("bias_act", x))) == "torch"
    assert "wrong on this machine" in ops.backends("bias_act", x)["lean"]
    # Nor by the shipped table, in this process, in another one, and under deterministic algorithms.
    assert OPS["bias_act"].shipped(x) == "torch"
    anew()
    assert OPS["bias_act"].shipped(x) == "lean"
    ops.bias_act(x)
    assert OPS["bias_act"].shipped(torch.randn(2, 3, 90, 90, dtype=torch.float64)) == "torch"
    assert ops.bias_act(x, backend="lean") is not None  # who requests it gets it
    assert calls == ["bias_act"]


def test_wrong_second_derivative_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_times(monkeypatch)
    right = attention_chunked.attention_second_backward

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        gq, gk, gv, gdo = right(*arguments)
        return gq, gk, gv, gdo + 1e-3 * gdo.abs().mean()

    monkeypatch.setattr(attention_chunked, "attention_second_backward", wrong)
    q = torch.randn(1, 1, 16, 8)
    op = OPS["scaled_dot_product_attention"]
    found = measure(op, CallClass(*op.classify(q, q, q)), (q, q, q), {}, ["chunked", "torch"])
    assert found["torch"].wrong is None
    assert found["chunked"].wrong is not None and "in a second derivative, small shape" in found["chunked"].wrong


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_implementation_that_fails_is_wrong(
    fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        if fault == "raises":
            raise RuntimeError("PTX was compiled for another GPU\nand more")
        return torch.full_like(q, math.nan), q[..., 0]

    monkeypatch.setattr(attention_chunked, "attention_forward", forward)
    q = torch.randn(1, 1, 300, 8, dtype=torch.float64)  # "chunked" is the shipped choice
    y = ops.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(y, torch.nn.functional.scaled_dot_product_attention(q, q, q))
    reason = "RuntimeError on the small shape: PTX was compiled" if fault == "raises" else "error inf in its result"
    assert reason in capfd.readouterr().err
    assert entry(folder)["forms"]["chunked"]["error"] is None  # JSON has no infinity


def test_slow_implementation_is_not_the_default(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastgan.ops.conv")
    quick = module.convolution

    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.01)
        return quick(*arguments)

    x, w = torch.randn(2, 3, 4, 4), torch.randn(3, 5, 4, 4)
    assert OPS["conv_transpose2d"].shipped(x, w) == "lean"
    monkeypatch.setattr(module, "convolution", slow)
    ops.conv_transpose2d(x, w)
    assert next(iter(ops.backends("conv_transpose2d", x, w))) == "torch"
    assert calls == ["conv_transpose2d"] * 2  # against the shipped table: measured twice


# --- where nothing is measured ---------------------------------------------------------------------------------------


def in_backward(x: Tensor) -> Tensor:
    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return ops.pixel_norm(ctx.saved_tensors[0].detach()) * g

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Node.apply(leaf).sum(), leaf)
    return gradient


def in_forward_mode(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return ops.pixel_norm(forward_ad.make_dual(x, x)).detach()


def in_fake_tensors(x: Tensor) -> Tensor:
    with FakeTensorMode():
        y = ops.pixel_norm(torch.empty(2, 3, 4, 4))
    assert y.shape == x.shape
    return ops.pixel_norm(x, backend="torch")


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "make_fx": lambda x: make_fx(lambda x: ops.pixel_norm(x))(x)(x),
    "compile": torch.compile(lambda x: ops.pixel_norm(x), backend="eager"),
    "vmap": lambda x: torch.vmap(lambda x: ops.pixel_norm(x[None])[0])(x),
    "backward": in_backward,
    "forward mode": in_forward_mode,
    "fake tensors": in_fake_tensors,
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_measured_inside(place: str, calls: list[str]) -> None:
    x = torch.randn(2, 3, 4, 4)
    y = PLACES[place](x)
    assert calls == []
    torch.testing.assert_close(y, ops.pixel_norm(x, backend="torch"))


def test_class_that_was_met_inside_keeps_the_shipped_choice_until_it_is_qualified(calls: list[str]) -> None:
    x = torch.randn(2, 3, 4, 4)
    make_fx(lambda x: ops.pixel_norm(x))(x)
    ops.pixel_norm(x)
    assert calls == [] and qualification.pending() == 1
    assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by the shipped table")
    assert qualification.qualify_pending() == 1
    assert calls == ["pixel_norm"] and qualification.pending() == 0
    assert next(iter(ops.backends("pixel_norm", x).values())).endswith("chosen here by measurement")


def test_trace_has_the_choice_that_is_in_force(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, 3, 4, 4), torch.randn(3, 5, 4, 4)
    with_times(monkeypatch, lean=100.0, torch=1.0)

    def names() -> set[str]:
        def step(x: Tensor, w: Tensor) -> Tensor:
            return torch.autograd.grad(ops.conv_transpose2d(x, w).square().sum(), w)[0]

        return {str(node.target) for node in make_fx(step)(x, w.requires_grad_()).graph.nodes}

    assert "aten.convolution_backward.default" in names()  # by the shipped table
    anew()
    ops.conv_transpose2d(x, w)
    seen: list[str] = []
    chosen = OPS["conv_transpose2d"].choose
    monkeypatch.setattr(OPS["conv_transpose2d"], "choose", lambda *a, **k: seen.append(chosen(*a, **k)) or seen[-1])
    names()
    assert seen == ["torch"]


def test_caller_s_state_is_left_alone(calls: list[str]) -> None:
    x = torch.randn(2, 3, 4, 4)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.pixel_norm(x)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert calls == ["pixel_norm"] and y.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), random_state) and torch.get_num_threads() == threads
    torch.set_flush_denormal(True)
    seen: list[Any] = []
    saved = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
    with torch.no_grad(), saved:
        ops.minibatch_stddev(x)
        assert not torch.is_grad_enabled()
    assert calls[1:] == ["minibatch_stddev"] and seen == []


@pytest.mark.parametrize("how", ["deterministic", "environment", "configure"])
def test_shipped_table_can_be_required(how: str, calls: list[str], folder: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    try:
        if how == "deterministic":
            torch.use_deterministic_algorithms(True)
        elif how == "environment":
            os.environ["FASTGAN_QUALIFY"] = "0"
            anew()
        else:
            qualification.configure(enabled=False)
        ops.pixel_norm(x)
        assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by the shipped table")
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == [] and not folder.exists()


def test_variable_has_two_values(folder: Path) -> None:
    os.environ["FASTGAN_QUALIFY"] = "yes"
    with pytest.raises(ValueError, match=r"^FASTGAN_QUALIFY must be 0 or 1, got 'yes'$"):
        ops.pixel_norm(torch.zeros(2, 3))


def test_measurement_that_cannot_take_place_ends_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(qualification, "measure", full)
    assert ops.pixel_norm(torch.randn(2, 3)).shape == (2, 3)
    assert "could not be measured, and the shipped table decides (OutOfMemoryError: out of" in capfd.readouterr().err


# --- the cache -------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time, torch
from fastgan import ops
from fastgan.ops import qualification
measure, n = qualification.measure, []
def counted(*arguments):
    n.append(1)
    time.sleep(0.5)
    return measure(*arguments)
qualification.measure = counted
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
x = torch.randn(2, 3, 4, 4)
ops.bias_act(x, act="relu")
print(len(n), *(name for name, _ in next(iter(qualification.OPS["bias_act"].decisions.values())).candidates))
"""


def add_to_cache(folder: Path, seconds: float, measured: Any) -> None:
    store = qualification_cache.Store({"device": "one"}, folder)
    with store.locked():
        if "a class" not in store.classes:
            measured.put(os.getpid())
            time.sleep(seconds)
            store.add("a class", {"order": ["torch"], "forms": {"torch": {}}, "why": str(os.getpid())})
    measured.put(store.classes["a class"]["why"])


def test_processes_take_turns_at_the_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    measured = context.SimpleQueue()
    children = [context.Process(target=add_to_cache, args=(tmp_path, 0.1, measured)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=30)
    seen = [measured.get() for _ in range(4)]
    assert {str(it) for it in seen} == {str(seen[0])} and seen[0] in [child.pid for child in children]


@pytest.mark.slow
def test_two_processes_at_once_share_one_measurement(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "FASTGAN_BUILD": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("FASTGAN_QUALIFY")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    children = [subprocess.Popen([sys.executable, "-c", CHILD], **pipes) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    results = sorted(child.communicate(timeout=60)[0].split() for child in children)
    assert [child.returncode for child in children] == [0, 0]
    (waited, *its_order), (measured, *order) = results
    assert waited == "0" and measured in ("1", "2")  # twice where it speaks against the shipped table
    assert order == its_order and sorted(order) == ["lean", "torch"]
    assert len(entry(tmp_path / "fastgan" / "qualification")["forms"]) == 2


def test_cache_of_another_driver_is_not_read(calls: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 4)
    about = qualification_cache.machine

    def with_driver(version: str) -> None:
        monkeypatch.setattr(qualification, "machine", lambda device: {**about(device), "driver": version})
        anew()
        ops.pixel_norm(x)

    with_driver("550.1")
    with_driver("550.1")
    assert len(calls) == 1
    with_driver("580.2")
    assert len(calls) == 2 and len(list(folder.glob("*.json"))) == 2
    with_driver("550.1")
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema": 1, "machine": {}, "classes": {}}', "\x00\xff"])
def test_broken_cache_is_measured_anew(
    content: str, calls: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(2, 3, 4, 4)
    ops.pixel_norm(x)
    (file,) = folder.glob("*.json")
    whole = file.read_text()
    file.write_text(content)
    anew()
    ops.pixel_norm(x)
    assert calls == ["pixel_norm"] * 2
    assert "is not what was written there" in capfd.readouterr().err
    assert json.loads(file.read_text())["classes"].keys() == json.loads(whole)["classes"].keys()


@pytest.mark.parametrize(
    "change", [{"order": "cpp"}, {"order": [1]}, {"forms": []}, {"why": None}, {"order": ["rm"], "forms": {"rm": {}}}]
)
def test_entry_with_other_content_is_measured_anew(change: dict[str, Any], calls: list[str], folder: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    ops.pixel_norm(x)
    (file,) = folder.glob("*.json")
    content = json.loads(file.read_text())
    next(iter(content["classes"].values())).update(change)
    file.write_text(json.dumps(content))
    anew()
    ops.pixel_norm(x)
    assert calls == ["pixel_norm"] * 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", ["full disk", "no folder"])
def test_cache_that_cannot_be_written(
    fault: str,
    ranks: int,
    calls: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(file: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if fault == "full disk":
        monkeypatch.setattr(qualification_cache, "write_atomic", full)
    else:
        folder.parent.mkdir()
        folder.write_text("a file, where the folder should be")
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):
        assert ops.pixel_norm(x).shape == x.shape
    told = capfd.readouterr().err
    assert told.count("cannot be written") == 1
    by = next(iter(ops.backends("pixel_norm", x).values()))
    if ranks == 1:  # used in this process, and measured by each
        assert calls == ["pixel_norm"] and by.endswith("chosen here by measurement")
        assert "what is measured is not kept" in told
    else:  # ranks could not share it
        assert by.endswith("by the shipped table") and "as ranks must agree" in told


def test_new_implementation_is_measured_with_the_others(calls: list[str], folder: Path) -> None:
    """As after the compiler that an earlier process lacked was installed."""
    x = torch.randn(2, 3, 4, 4)
    ops.bias_act(x, act="relu")
    (file,) = folder.glob("*.json")
    content = json.loads(file.read_text())
    found = next(iter(content["classes"].values()))
    found["order"] = [name for name in found["order"] if name != "lean"]
    del found["forms"]["lean"]
    file.write_text(json.dumps(content))
    anew()
    ops.bias_act(x, act="relu")
    assert len(calls) >= 2 and "lean" in entry(folder)["forms"]


# --- what a run stores -----------------------------------------------------------------------------------------------


def decisions(name: str) -> list[list[str]]:
    return [[form for form, _ in it.candidates] if it else [] for it in OPS[name].decisions.values()]


def test_resumed_run_gets_the_recorded_choices(calls: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 4)
    ops.bias_act(x, act="relu")
    make_fx(lambda x: ops.pixel_norm(x))(x)  # by the shipped table, as it was met in a trace
    stored = json.loads(json.dumps(qualification.record(CPU)))
    (order,) = decisions("bias_act")
    measured = len(calls)
    for file in folder.glob("*.json"):  # the user has emptied the cache, and times would be others now
        file.unlink()
    anew()
    with_times(monkeypatch, **{name: 10.0 * (i + 1) for i, name in enumerate(reversed(order))})
    assert qualification.adopt(stored, CPU) is None
    ops.bias_act(x, act="relu")
    ops.pixel_norm(x)
    assert decisions("bias_act") == [order] and decisions("pixel_norm") == [[]]
    assert len(calls) == measured
    assert qualification.record(CPU) == stored
    ops.minibatch_stddev(x)  # a class that the run had not met
    assert calls[measured] == "minibatch_stddev"


def test_resume_elsewhere_says_what_differs(calls: list[str]) -> None:
    x = torch.randn(2, 3, 4, 4)
    ops.pixel_norm(x)
    stored = qualification.record(CPU)
    stored["machine"] = {**stored["machine"], "device": "another processor, 96 threads", "torch": "2.10.0"}
    anew()
    said = qualification.adopt(stored, CPU)
    assert said is not None and "\n" not in said
    assert said.startswith("implementations are chosen anew for this machine, and results may differ by rounding: ")
    assert "not another processor, 96 threads" in said and f"torch {torch.__version__}, not 2.10.0" in said
    assert "sources" not in said


def test_resume_with_or_without_measurements(calls: list[str]) -> None:
    x = torch.randn(2, 3, 4, 4)
    measured = qualification.record(CPU)
    qualification.configure(enabled=False)
    said = qualification.adopt(measured, CPU)
    assert said == "the run chose its implementations by measurement; now the shipped table decides (switched off)"
    shipped = qualification.record(CPU)
    anew()
    assert qualification.adopt(shipped, CPU) == "the shipped table decides, as in the run so far (switched off)"
    ops.pixel_norm(x)
    assert calls == []
    anew()
    assert qualification.adopt(None, CPU) is None  # a checkpoint of an older version
    ops.pixel_norm(x)
    assert calls == ["pixel_norm"]


def test_record_from_elsewhere_is_data() -> None:
    stored = {**qualification.record(CPU), "shipped": None, "classes": {"pixel_norm": "torch", "x": [1], "y": {}}}
    assert qualification.adopt(stored, CPU) is not None  # the tests' own table is the shipped one
    assert not OPS["pixel_norm"].decisions


def test_float64_oracle_sees_what_float32_computes() -> None:
    """The rule of `_compare`: plain PyTorch itself is right, in every dtype."""
    x = random(4, 6, 8, 8).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        op = OPS["minibatch_stddev"]
        inputs = (x.to(dtype),)
        found = measure(op, CallClass(*op.classify(*inputs)), inputs, {"eps": 1e-8}, ["torch"])
        assert found["torch"].wrong is None and found["torch"].error == found["torch"].plain_error


# --- a busy machine --------------------------------------------------------------------------------------------------


def test_times_of_a_busy_machine_decide_nothing(
    calls: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    counts = iter(range(0, 10**9, 50))
    monkeypatch.setattr(qualification_measure, "interruptions", lambda: next(counts))
    x, w = torch.randn(2, 3, 4, 4), torch.randn(3, 5, 4, 4)
    ops.conv_transpose2d(x, w)
    ops.conv_transpose2d(x, w)
    assert calls == ["conv_transpose2d"]
    assert entry(folder)["order"][0] == "lean" and entry(folder)["forms"]["torch"]["device_us"] is None
    assert capfd.readouterr().err.count("other programs are running") == 1
    anew()
    ops.conv_transpose2d(x, w)  # another process, soon: it agrees
    assert calls == ["conv_transpose2d"]
    later = time.time() + 4000.0
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(qualification_measure, "interruptions", lambda: 0)
    anew()
    ops.conv_transpose2d(x, w)  # another process, later
    assert len(calls) > 1 and "until" not in entry(folder)
    assert entry(folder)["forms"]["torch"]["device_us"] > 0
