"""Implementations are compared and timed on the machine they run on, once, and what is wrong is never used."""

from __future__ import annotations

import importlib
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import anew, entry, with_times, without_times
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointError, checkpoint

from fastgan import models, ops
from fastgan.generator import TrainedGenerator
from fastgan.ops import attention_chunked, qualification
from fastgan.ops.dispatch import backend
from fastgan.ops.dispatch.backend import OPS, CallClass
from fastgan.ops.qualification import measurement
from fastgan.ops.qualification.cases import MEASURED_OPS
from fastgan.ops.qualification.drawing import drawing
from fastgan.ops.qualification.measurement import Measurement, measure

ROOT = Path(ops.__file__).parents[2]
CPU = torch.device("cpu")


# --- the first call --------------------------------------------------------------------------------------------------


def test_first_call_of_a_class_measures_and_later_processes_read(calls: list[str], folder: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by the shipped table")
    assert calls == []  # a question measures nothing
    ops.pixel_norm(x)
    ops.pixel_norm(torch.randn(2, 3, 5, 5))  # the same class
    assert calls == ["pixel_norm"]
    first, why = next(iter(ops.backends("pixel_norm", x).items()))
    assert why.endswith("; by measurement")
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
    elif name.endswith("norm") and "pixel" not in name:
        inputs, options = (x, torch.randn(6).to(dtype)), {"groups": 3}
        if name == "layer_norm":
            inputs, options = (x, torch.randn(8, 8).to(dtype)), {"shape": (8, 8)}
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


def test_ops_that_have_classes_are_those_that_are_measured() -> None:
    assert {op.name for op in OPS.values() if op.classify is not None} == set(MEASURED_OPS)
    several = {op.name for op in OPS.values() if not set(op.implementations) <= {"lean", "torch"}}
    assert several <= set(MEASURED_OPS)


def test_calls_without_a_class_run_by_the_shipped_table(calls: list[str]) -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for y in (
        *(ops.avg_pool2d(x, 3, 1, 1), ops.avg_pool2d(x[0]), ops.avg_pool2d(x, 2, ceil_mode=True)),
        *(ops.interpolate(x, (3, 3), mode="area"), ops.relu(x), ops.leaky_relu(x * 1.0, 0.2, True)),
        *(ops.max_pool2d(x, 2), ops.adaptive_avg_pool2d(x, 3), ops.pad(x, (1,) * 4, "reflect"), ops.abs(x)),
    ):
        y.sum().backward()
    assert calls == []
    assert torch.equal(ops.avg_pool2d(x, 3, 1, 1), torch.nn.functional.avg_pool2d(x, 3, 1, 1))
    ops.avg_pool2d(x, (2, 2), [2, 2])
    assert calls == ["avg_pool2d"]


def test_a_checkpoint_recomputes_what_was_chosen(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that is first met inside of one is measured there; its forms, `native` too, are told from plain ones."""
    with_times(monkeypatch, native=1.0, cpp=9.0, lean=9.0, torch=9.0)
    x, bias = torch.randn(2, 3, 4, 4), torch.randn(3)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ops.bias_act(leaf * 1.0, bias, backend="torch").square().sum(), leaf)

    def part(x: Tensor) -> Tensor:
        return ops.bias_act(x * 1.0, bias)

    y = checkpoint(part, leaf, use_reentrant=False).square().sum()
    assert calls == ["bias_act"] and next(iter(ops.backends("bias_act", x))) == "native"
    torch.testing.assert_close(torch.autograd.grad(y, leaf)[0], expected)
    with ops.use_backend("torch"):
        y = checkpoint(part, leaf, use_reentrant=False).square().sum()
    with pytest.raises(CheckpointError):
        torch.autograd.grad(y, leaf)


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
    monkeypatch.setattr(measurement, "interruptions", lambda: 0)  # by other tests, which take less than these 10 ms
    ops.conv_transpose2d(x, w)
    assert next(iter(ops.backends("conv_transpose2d", x, w))) == "torch"
    assert calls == ["conv_transpose2d"] * 2  # against the shipped table: measured twice


def test_an_interrupt_waits_for_the_measurement_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    join, calls, ended = threading.Thread.join, [], []

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        calls.append(thread.name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)

    def work() -> None:
        time.sleep(0.05)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        measurement.in_thread(work)
    assert ended == [True] and calls == ["fastgan-qualification"] * 2


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


def test_drawing_measures_nothing_and_leaves_the_class_to_what_trains(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of a seed do not depend on what was measured: here that a form is the fastest which is not shipped."""
    with_times(monkeypatch, cpp=100.0, native=100.0, lean=100.0, torch=1.0)
    networks = {"model": "pggan", "resolution": 8, "channels": 3, "latent": 8, "num_classes": 0}
    module = models.build_one(False, **networks, fmap_base=32, fmap_max=8).eval().requires_grad_(False)
    generator = TrainedGenerator(module, {"networks": networks})
    x = torch.randn(4, 8, 8, 8)
    shipped = OPS["pixel_norm"].shipped(x)
    before = generator.sample(4)
    with drawing(CPU):
        assert OPS["pixel_norm"].choose(None, x) == shipped != "torch"
        with ops.use_backend("torch"):
            assert OPS["pixel_norm"].choose(None, x) == "torch"
    with ops.use_backend("torch"), drawing(CPU):
        assert OPS["pixel_norm"].choose(None, x) == "torch"
    assert calls == [] and qualification.pending() == 0
    assert OPS["pixel_norm"].choose(None, x) == "torch" and set(calls) == {"pixel_norm"}
    generator.module(torch.randn(4, 8), None)
    assert len(set(calls)) > 1  # what trains measures the classes that were drawn before
    assert torch.equal(generator.sample(4), before)
    with drawing(CPU):
        assert OPS["pixel_norm"].choose(None, x) == shipped
        assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by the shipped table")


def test_what_was_wrong_here_is_not_drawn_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_times(monkeypatch)
    x = torch.randn(2, 3, 4, 4)
    shipped = OPS["pixel_norm"].shipped(x)
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "_compare", lambda *given: Measurement(wrong="so" if given[-1] == shipped else None))
        ops.pixel_norm(x)
    anew()
    with drawing(CPU):
        assert OPS["pixel_norm"].choose(None, x) != shipped


def test_class_that_was_met_inside_keeps_the_shipped_choice_until_it_is_qualified(calls: list[str]) -> None:
    x = torch.randn(2, 3, 4, 4)
    make_fx(lambda x: ops.pixel_norm(x))(x)
    ops.pixel_norm(x)
    assert calls == [] and qualification.pending() == 1
    assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by the shipped table")
    assert qualification.qualify_pending() == 1
    assert calls == ["pixel_norm"] and qualification.pending() == 0
    assert next(iter(ops.backends("pixel_norm", x).values())).endswith("by measurement")


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
