"""The programs in examples/ run, each in a second or two, and print what they are there to show."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastgan
from fastgan import models, objectives
from fastgan.cli import main as cli

FOLDER = Path(fastgan.__file__).parents[1] / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))


def example(name: str) -> Any:
    """The module examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; models and losses that a program registers are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    known = dict(models.MODELS), dict(objectives.LOSSES)
    yield tmp_path
    for registry, before in zip((models.MODELS, objectives.LOSSES), known, strict=True):
        registry.clear()  # type: ignore[attr-defined]
        registry.update(before)  # type: ignore[attr-defined]


def test_every_program_is_run_here_and_short() -> None:
    source = Path(__file__).read_text()
    for name in PROGRAMS:
        assert f'example("{name}")' in source, f"no test runs examples/{name}.py"
        lines = len((FOLDER / f"{name}.py").read_text().splitlines())
        assert 20 <= lines <= 70, (name, lines)
        assert f"python examples/{name}.py" in (FOLDER / f"{name}.py").read_text(), f"{name} does not say how to run it"


def test_train_and_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    example("train_from_python").main(0.128, "run")
    assert "wgan-gp at 0.128 kimg in run: [16, 1, 16, 16]" in capsys.readouterr().out
    example("evaluate_from_python").main("run", "digits", 64)
    output = capsys.readouterr().out
    assert "wgan-gp at 0.128 kimg, 64 images against digits" in output and "frechet_distance" in output
    assert cli.main(["evaluate", "run", "--n", "64", "--metrics", "msssim"]) == 0
    (of_python,) = [line.split()[1] for line in output.splitlines() if "ms_ssim" in line]
    assert f"MS-SSIM of pairs  {of_python}" in capsys.readouterr().out  # the same number


def test_penalized_critic(capsys: pytest.CaptureFixture[str]) -> None:
    example("penalized_critic").main()
    assert "\nfastgan: penalty 0." in capsys.readouterr().out


def test_custom_network(capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_network").main(0.128, "run")
    assert "gan at 0.128 kimg: Generator, [16, 1, 16, 16]" in capsys.readouterr().out
    assert cli.main(["export", "run"]) == 0  # in this process, which knows the model
    assert fastgan.load("run/export").sample(1).shape == (1, 1, 16, 16)
    capsys.readouterr()
    del models.MODELS["patterns"]
    for command in (["sample", "run"], ["sample", "run/export"], ["export", "run"]):
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "its model is 'patterns', which is none of mlp, dcgan, sagan, pggan, r3gan" in line, command
        assert "fastgan.models.register" in line, command


def test_custom_loss(capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_loss").main(0.128, "run")
    assert "dcgan at 0.128 kimg with a loss of our own in run" in capsys.readouterr().out
    del objectives.LOSSES["squared-hinge"]
    assert cli.main(["sample", "run", "--n", "1"]) == 0
    assert cli.main(["evaluate", "run", "--n", "16", "--metrics", "msssim"]) == 0


def test_sample_and_interpolate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("sample_and_interpolate").main("avatars")
    size = fastgan.load("avatars").meta["networks"]["resolution"]
    for name, rows in {"samples": 4, "walks": 4, "path": 1}.items():
        with Image.open(here / f"{name}.png") as image:
            assert image.size == (8 * size, rows * size), name
            assert len(image.getcolors(2**24) or []) > 100, f"{name} is blank"
    shutil.copy(Path(fastgan.trained.FOLDER) / "avatars.safetensors", here / "file.safetensors")
    example("sample_and_interpolate").main("file.safetensors")
    assert f"{size} px" in capsys.readouterr().out


@pytest.mark.slow  # two programs are compiled
def test_compile_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = example("compile_step")
    monkeypatch.setattr(program, "milliseconds", lambda step: 0.0 * len(str(step())))
    program.main()
    output = capsys.readouterr().out
    assert "wgan_gp: loss" in output and "r1: loss" in output and "torch.compile:" in output
