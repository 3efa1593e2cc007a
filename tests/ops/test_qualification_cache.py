"""The cache of measurements, what a run stores of them, and a busy machine."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kernelcases import random
from measurements import anew, entry, with_times
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan import ops
from fastgan.ops import qualification
from fastgan.ops.dispatch.backend import OPS, CallClass
from fastgan.ops.qualification import cache as qualification_cache
from fastgan.ops.qualification import measurement
from fastgan.ops.qualification.measurement import measure

ROOT = Path(ops.__file__).parents[2]
CPU = torch.device("cpu")


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
        assert calls == ["pixel_norm"] and by.endswith("by measurement")
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
    monkeypatch.setattr(measurement, "interruptions", lambda: next(counts))
    x, w = torch.randn(2, 3, 4, 4), torch.randn(3, 5, 4, 4)
    ops.conv_transpose2d(x, w)
    ops.conv_transpose2d(x, w)
    assert calls == ["conv_transpose2d"]
    assert entry(folder)["order"][0] == "lean" and entry(folder)["forms"]["torch"]["device_us"] is None
    assert capfd.readouterr().err.count("disturbed the timing of some ops") == 1
    anew()
    ops.conv_transpose2d(x, w)  # another process, soon: it agrees
    assert calls == ["conv_transpose2d"]
    later = time.time() + 4000.0
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(measurement, "interruptions", lambda: 0)
    anew()
    ops.conv_transpose2d(x, w)  # another process, later
    assert len(calls) > 1 and "until" not in entry(folder)
    assert entry(folder)["forms"]["torch"]["device_us"] > 0
