"""`--device mps`, with stand-ins: there is no Mac here, so what torch's backend for its GPU does is not tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgan
from fastgan.cli import main
from fastgan.config import Config, replace, validate
from fastgan.config.files import read_yaml
from fastgan.errors import ArgumentError
from fastgan.models import build
from fastgan.training.distributed.rendezvous import pick_device
from fastgan.training.from_config import build_augmentation, build_step, memory_format
from fastgan.training.precision import DeviceFacts, choose
from fastgan.utils import process, system
from fastgan.video import loop

SMALL = "--variant dcgan --width 8 --max-width 8 --latent 4 --resolution 8 --batch 8 --kimg 0.016 --samples 1".split()


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU torch can use."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_without_a_mac_every_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = "--device must be cpu, got 'mps'; this torch is built without MPS"
    for argv in (["train", *SMALL], ["sample", "avatars"], ["explore", "avatars"], ["project", "avatars", "a.png"]):
        assert words in refused(capsys, *argv, "--device", "mps"), argv
    with pytest.raises(ArgumentError, match=r"^device must be cpu, got 'mps'; this torch is built without MPS$"):
        fastgan.load("avatars", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    assert system.missing_device("mps") == "must be cpu; torch sees no Apple GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert system.missing_device("mps") == "must be cpu or cuda; torch sees no Apple GPU here"


def test_it_is_taken_by_name_alone(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("mps") == torch.device("mps")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match="must be cpu or cuda with several ranks, got 'mps'; a Mac has one GPU"):
        pick_device("mps")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "bf16"}, "--precision must be fp32 with --device mps, got 'bf16'"),
        ({"precision": "fp16"}, "--precision must be fp32 with --device mps, got 'fp16'"),
        ({"engine": "deepspeed"}, "--engine must be torch with --device mps, got 'deepspeed'"),
        ({"compile": "on"}, "--compile must be off or auto with --device mps, which stays eager, got 'on'"),
    ],
)
def test_what_it_does_not_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        validate(replace(Config(), system={"device": "mps", **settings}))
    assert str(error.value) == words


def test_it_is_float32_and_contiguous() -> None:
    facts = DeviceFacts.of(torch.device("mps"))
    assert facts == DeviceFacts("mps", bf16=False, tf32=False)
    assert choose(facts, "dcgan", frozenset({"dcgan"})) == ("fp32", "on mps nothing else is offered")
    of_mac = replace(Config(), system={"device": "mps"})
    assert memory_format(of_mac) == torch.contiguous_format and memory_format(Config()) == torch.channels_last
    chosen = replace(of_mac, system={"memory_format": "channels_last"})
    assert memory_format(chosen) == torch.channels_last


def test_a_run_on_a_stand_in(
    mac: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole run of `--device mps`, on the CPU in the place of the GPU."""
    name = "fastgan.training.distributed.rendezvous.pick_device"
    monkeypatch.setattr(name, lambda device: torch.device("cpu") if device == "mps" else None)
    assert main.main(["train", *SMALL, "--device", "mps", "--out", str(tmp_path / "run")]) == 0
    assert "done: 0.016 kimg" in capsys.readouterr().out
    assert read_yaml(tmp_path / "run" / "config.yaml", "RUN")["system"]["device"] == "mps"


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), f"{op} computes in float64"
        return result


@pytest.mark.parametrize("model", ["mlp", "dcgan", "sagan", "pggan", "r3gan"])
def test_no_step_computes_in_float64(model: str) -> None:
    """The GPU of a Mac has none."""
    sizes: dict[str, Any] = {"resolution": 16, "channels": 3, "latent": 4, "width": 8, "max_width": 8}
    networks = {"model": model, "fmap_base": 64, "fmap_max": 8, "num_classes": 0, "norm_d": "none", **sizes}
    generator, discriminator = build(**networks)
    for augment in ("none", "ada", "diffaugment"):
        config = replace(
            Config(),
            networks={"model": model},
            objective={"loss": "wasserstein", "regularizer": "gradient-penalty"},
            data={"augment": augment},
            system={"precision": "fp32"},
        )
        augmentation = build_augmentation(config, 3, torch.device("cpu"))
        step = build_step(config, generator, discriminator, 0, augmentation)
        images, positions = torch.rand(4, 3, 16, 16), torch.arange(4)
        with _NoFloat64():
            step.discriminator_loss(images, positions)[0].backward()
            step.generator_loss(positions)[0].backward()


def test_videos_walk_in_float32_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.linspace(0, 1, 5)
    found = loop(0, torch.arange(2), 4, t, 2)
    assert found.dtype == torch.float32 and torch.allclose(found[0], found[-1], atol=1e-6)
    with pytest.raises(AssertionError, match="float64"), _NoFloat64():  # the angles, on the host
        loop(0, torch.arange(2), 4, t, 2)


def test_torch_names_what_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.sys, "platform", "darwin")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.delenv(process.FALLBACK_VARIABLE, raising=False)
    assert "torch was loaded before" in process.fall_back_from_mps()
    without = {name: module for name, module in process.sys.modules.items() if name != "torch"}
    monkeypatch.setattr(process.sys, "modules", without)
    assert process.configure_process()["ops that mps lacks"].startswith("PYTORCH_ENABLE_MPS_FALLBACK=1")
    assert process.os.environ[process.FALLBACK_VARIABLE] == "1"
    assert process.fall_back_from_mps() == "PYTORCH_ENABLE_MPS_FALLBACK=1"
    monkeypatch.setattr(process.sys, "platform", "linux")
    assert "ops that mps lacks" not in process.configure_process()
