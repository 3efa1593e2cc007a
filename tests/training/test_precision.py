"""`--precision`: what auto takes and why, what a run stores, and the flags and files of earlier versions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from fastgan import checkpoint
from fastgan.cli import train
from fastgan.config import Config, replace
from fastgan.config.files import merge, read_yaml
from fastgan.config.variants import VARIANTS
from fastgan.errors import ArgumentError
from fastgan.planning import step_times
from fastgan.training import precision
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.precision import QUALIFIED_FOR_BF16, DeviceFacts, choose, resolve
from fastgan.utils import old_names
from fastgan.utils.system import cpu_flags

OLD_CPU, NEW_CPU = DeviceFacts("cpu", bf16=False, tf32=False), DeviceFacts("cpu", bf16=True, tf32=False)
OLD_GPU, NEW_GPU = DeviceFacts("cuda", bf16=False, tf32=False), DeviceFacts("cuda", bf16=True, tf32=True)
ONE = ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
TINY = "--variant gan --width 8 --resolution 8 --latent 4 --batch 8 --kimg 0.016 --samples 4".split()


def configured(value: str) -> Config:
    return replace(Config(), system={"precision": value})


@pytest.mark.parametrize(
    ("facts", "qualified", "takes", "because"),
    [
        (OLD_CPU, True, "fp32", "this CPU has no bfloat16"),
        (NEW_CPU, True, "bf16", "this CPU multiplies bfloat16"),
        (NEW_CPU, False, "fp32", "that pggan ends as well in bf16 is not shown yet"),
        (OLD_GPU, True, "fp32", "this GPU has no bfloat16, nor TF32"),
        (NEW_GPU, True, "bf16", "this GPU multiplies bfloat16"),
        (NEW_GPU, False, "tf32", "this GPU has TF32, and that pggan ends as well"),
    ],
)
def test_auto(facts: DeviceFacts, qualified: bool, takes: str, because: str) -> None:
    chosen, reason = choose(facts, "pggan", frozenset({"pggan"} if qualified else ()))
    assert chosen == takes and because in reason


def test_qualified_are_variants() -> None:
    assert set(VARIANTS) >= QUALIFIED_FOR_BF16


def test_ranks_take_what_all_of_them_can() -> None:
    for left, right in itertools.product((OLD_GPU, NEW_GPU), repeat=2):
        assert DeviceFacts.common([left, right]).bf16 == (left.bf16 and right.bf16)
        assert DeviceFacts.common([left, right]).tf32 == (left.tf32 and right.tf32)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_facts_of_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    assert DeviceFacts.of(device) == OLD_CPU
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset({"avx2", name}))
    assert DeviceFacts.of(device) == NEW_CPU


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="only Linux lists what its processor can do")
def test_flags_of_this_cpu() -> None:
    assert {"sse2", "fp"} & cpu_flags() or "asimd" in cpu_flags()


@pytest.mark.parametrize("value", ["fp32", "tf32", "bf16", "fp16"])
def test_what_is_asked_for_is_taken(value: str) -> None:
    config, note = resolve(configured(value), "pggan", ONE)
    assert config == configured(value) and note.startswith(f"precision {value} (as configured")


def test_a_precision_that_does_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_flags", frozenset)
    assert "it is fp32" in resolve(configured("tf32"), "pggan", ONE)[1]
    assert "slower than fp32" in resolve(configured("bf16"), "pggan", ONE)[1]


def test_a_run_stores_what_auto_was_and_a_resume_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(precision, "choose", lambda facts, variant: ("bf16", "this CPU multiplies bfloat16"))
    assert train.main([*TINY, "--out", str(run)]) == 0
    assert "precision bf16 (auto: this CPU multiplies bfloat16)" in capsys.readouterr().out
    assert read_yaml(run / "config.yaml", "RUN")["system"]["precision"] == "bf16"
    stored = checkpoint.read(run, "RUN").training()
    tensors = [
        t for group in ("generator", "discriminator", "optimizer_g", "optimizer_d") for t in stored[group].values()
    ]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}

    monkeypatch.setattr(precision, "choose", lambda facts, variant: ("fp32", "of another machine"))
    assert train.main(["--resume", str(run), "--kimg", "0.032"]) == 0
    assert "precision bf16 (as configured)" in capsys.readouterr().out


def test_allow_tf32_follows_the_precision(tmp_path: Path) -> None:
    for value in ("tf32", "fp32"):
        assert train.main([*TINY, "--precision", value, "--out", str(tmp_path / value)]) == 0
        assert torch.backends.cuda.matmul.allow_tf32 == (value == "tf32")
        assert torch.backends.cudnn.allow_tf32 == (value == "tf32")


@pytest.mark.parametrize(
    ("system", "now"),
    [
        ({"precision": "fp32", "penalty_precision": "auto", "tf32": False}, "fp32"),
        ({"precision": "fp32", "penalty_precision": "auto", "tf32": True}, "tf32"),
        ({"precision": "bf16", "penalty_precision": "auto", "tf32": False}, "bf16"),
        ({"precision": "bf16", "penalty_precision": "auto", "tf32": True}, "bf16"),
        ({"precision": "bf16", "penalty_precision": "fp32", "tf32": False}, "fp32"),
        ({"tf32": True}, "tf32"),
        ({"tf32": False}, "fp32"),
        ({"penalty_precision": "fp32"}, "auto"),
        ({"precision": "fp16"}, "fp16"),
        ({}, "auto"),
    ],
)
def test_files_of_earlier_versions(system: dict[str, object], now: str, tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    lines = [f"  {key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in system.items()]
    file.write_text("\n".join(["system:" if lines else "system: {}", *lines, "  zero: 1" if lines else ""]))
    config = merge(Config(), read_yaml(file, "--config"), str(file))
    assert config.system.precision == now and config.system.zero == (1 if lines else 0)


def test_other_precisions_are_no_setting() -> None:
    assert old_names.current_names({"precision": 0.7, "recall": 0.4}) == {"precision": 0.7, "recall": 0.4}


@pytest.mark.parametrize(
    ("flags", "now"),
    [
        ("--tf32", "--precision tf32"),
        ("--no-tf32 --kimg 2", "--kimg 2 --precision fp32"),
        ("--precision bf16 --tf32", "--precision bf16"),
        ("--precision=bf16 --penalty-precision=fp32 --zero 1", "--zero 1 --precision fp32"),
        ("--penalty_precision auto --precision bf16", "--precision bf16"),
        ("--penalty-precision fp32", ""),
        ("--precision bf16 --zero 1", "--precision bf16 --zero 1"),
    ],
)
def test_flags_of_earlier_versions(flags: str, now: str) -> None:
    assert old_names.current_flags(flags.split()) == now.split()


def test_steps_measured_in_another_precision(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    recipe = {**step_times.recipe_of(configured("fp32"), 1), "penalty_precision": "auto", "tf32": True}
    update = {"seconds": 1.0, "gradients": [[4, 0.0]], "lead": 0.0}
    timing = {"resolution": 8, "micro": 8, "fading": False, "d": update, "g": update}
    values = {"schema": step_times.SCHEMA, "device": "d", "torch": "2", "recipe": recipe, "timings": [timing]}
    file.write_text(json.dumps(values))
    for value in ("tf32", "auto"):
        assert step_times.read(str(file), step_times.recipe_of(configured(value), 1)).recipe["precision"] == "tf32"
    with pytest.raises(ArgumentError, match="was measured with precision 'tf32'; the run has 'bf16'"):
        step_times.read(str(file), step_times.recipe_of(configured("bf16"), 1))
