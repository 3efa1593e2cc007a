"""--preset auto and --hours as a user types them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

from fastgan import checkpoint
from fastgan.cli import main, train
from fastgan.config.auto import StageCost
from fastgan.training import auto

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--fmap-base 32 --fmap-max 8 --latent 4 --samples 4".split()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(40):
        image = Image.new("RGB", (96, 72), (5 * i, 90, 200 - 4 * i))
        ImageDraw.Draw(image).ellipse((12 + i % 7, 4, 40 + i % 9, 40), fill=(200, 6 * i, 30))
        image.save(path / f"{i}.png")
    return path


def config_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_pictures_get_auto_and_others_what_they_had(photos: Path) -> None:
    assert train.parse(["--data", f"folder:{photos}"]).preset == "auto"
    assert train.parse([]).preset == train.parse(["--data", "stacked-digits"]).preset == "digits"
    assert train.parse(["--data", "synthetic"]).preset == "paper"  # of which times are measured, and no images made


def test_a_run_of_its_time(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is printed before training, its values are stored, and a resumed run decides nothing again."""
    run = tmp_path / "run"
    argv = ["--data", f"folder:{photos}", "--hours", "0.0004", "--resolution", "8", *SMALL, "--out", str(run)]
    assert train.main(argv) == 0
    text = capsys.readouterr().out
    for words in ("auto: pictures: 40, 72 px", "auto: pggan: ", "auto: 8 px, ", "auto: augment ada: ", "done: "):
        assert words in text
    assert text.index("auto: 8 px") < text.index("left")
    stored = config_of(run)
    assert (stored["preset"], stored["variant"], stored["schedule"]["resolution"]) == ("auto", "pggan", 8)
    assert stored["networks"]["fmap_max"] == 8 and stored["data"]["augment"] == "ada"
    assert 0.001 <= stored["schedule"]["kimg"] < 60
    seen = checkpoint.read(checkpoint.existing(run)[-1], "RUN").meta["images"]
    assert seen >= round(1000 * stored["schedule"]["kimg"])
    assert train.main(["--resume", str(run), "--kimg", str(stored["schedule"]["kimg"] + 0.064)]) == 0
    assert "auto:" not in capsys.readouterr().out.replace("(auto:", "")
    again = config_of(run)
    again["schedule"]["kimg"], again["run"]["out"] = stored["schedule"]["kimg"], stored["run"]["out"]
    assert again == stored


@pytest.mark.slow
def test_the_same_settings_train_the_same_run(photos: Path, tmp_path: Path) -> None:
    """What was measured is in config.yaml alone: a run of that file ends with the same weights."""
    argv = ["--data", f"folder:{photos}", "--hours", "0.0005", "--resolution", "8", *SMALL, "--deterministic"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main([*argv, "--threads", "1", "--out", str(first)]) == 0
    assert train.main(["--config", str(first / "config.yaml"), "--out", str(second)]) == 0
    weights = [checkpoint.existing(run)[-1] / "generator.safetensors" for run in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_dry_run_has_times(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", f"folder:{photos}", "--hours", "1", "--resolution", "16", *SMALL, "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    assert train.main(argv) == 0
    text = capsys.readouterr().out
    assert re.search(r"^auto: 16 px, [\d.e+]+ kimg in [\d.]+ (min|h|s): as requested$", text, re.M)
    assert re.search(r"^ +16 .* GiB +[\d.]+ (s|min|h)$", text, re.M)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("preset", "scatter", "said"), [("auto", 0.4, "steps scatter by 40%"), ("digits", 0.2, "")])
def test_a_plan_that_other_programs_disturbed_says_so(
    preset: str,
    scatter: float,
    said: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 9.0, 9.0))
    measured = {8: StageCost(0.001, scatter=scatter), 4: StageCost(0.0001)}
    monkeypatch.setattr(auto, "stage_costs", lambda *given: {r: measured[r] for r in given[-1]})
    argv = ["--data", f"folder:{photos}", "--preset", preset, "--variant", "pggan", "--hours", "1", *SMALL]
    assert train.main([*argv, "--resolution", "8", "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: this machine is busy")]
    assert len(lines) == bool(said) and all(said in line for line in lines)


@pytest.mark.slow
def test_hours_replace_the_length_of_a_file(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "length.yaml"
    file.write_text("schedule: {kimg: 77777.0, resolution: 8}")
    argv = ["--data", f"folder:{photos}", "--config", str(file), *SMALL, "--dry-run"]
    assert train.main([*argv, "--hours", "0.001"]) == 0
    text = capsys.readouterr().out
    assert "77777" not in text and "auto: 8 px, " in text


def test_plan_is_of_what_auto_decides(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--data", f"folder:{photos}", "--kimg", "1", "--resolution", "8", *SMALL, "--gpus-per-node", "1"]
    assert main.main([*argv, "--measure-seconds", "0.01"]) == 0
    text = capsys.readouterr().out
    assert "auto: augment ada" in text and "pggan, auto preset: 1 kimg to 8 px" in text


@pytest.mark.slow
def test_ranks_agree_on_what_one_of_them_measured(photos: Path, tmp_path: Path) -> None:
    flags = ["--data", f"folder:{photos}", "--hours", "0.0003", "--resolution", "8", *SMALL, "--engine", "torch"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "fastgan/train.py")]
    result = subprocess.run(
        [*command, *flags, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=150
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("auto: augment ada") == 1 and "done: " in result.stdout
    assert config_of(tmp_path / "run")["schedule"]["batch"] == 16


@pytest.mark.slow
def test_hours_with_another_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--variant", "dcgan", "--hours", "0.0005", "--resolution", "8", "--width", "8", "--max-width", "8"]
    assert train.main([*argv, "--samples", "4", "--out", str(tmp_path / "run")]) == 0
    assert "hours: " in capsys.readouterr().out
    stored = config_of(tmp_path / "run")
    assert stored["preset"] == "digits" and stored["schedule"]["kimg"] != 600


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hours", "0"], "--hours must be above 0"),
        (["--hours", "nan"], "--hours must be above 0"),
        (["--hours", "2", "--kimg", "5"], "cannot be combined with --kimg"),
        (["--preset", "tiny"], "--preset must be auto, paper, paper-8-gpus or digits"),
    ],
)
def test_refusals(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_hours_are_of_new_runs(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    short = ["--data", f"folder:{photos}", "--kimg", "0.016", "--resolution", "8", "--batch", "8", *SMALL]
    assert train.main([*short, "--out", str(run)]) == 0
    assert train.main(["--resume", str(run), "--hours", "1"]) == 2
    assert "--hours" in capsys.readouterr().err
    assert train.main([*short, "--hours", "1", "--out", str(run)]) == 2


def test_a_taken_folder_is_refused_before_anything_is_measured(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("schema: 1")
    monkeypatch.setattr(auto, "stage_costs", lambda *_: pytest.fail("measured"))
    assert train.main(["--data", f"folder:{photos}", "--hours", "1", "--out", str(tmp_path / "run")]) == 2
    assert "--out" in capsys.readouterr().err


def test_resume_auto_finds_the_run_of_any_variant(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Auto may have taken any variant; the name of the folder says which."""
    monkeypatch.chdir(tmp_path)
    short = ["--data", f"folder:{photos}", "--kimg", "0.016", "--resolution", "8", "--batch", "8"]
    assert train.main([*short, "--variant", "dcgan", "--width", "8", "--max-width", "8", "--samples", "4"]) == 0
    assert train.main(["--data", f"folder:{photos}", "--resume", "auto", "--kimg", "0.024"]) == 0
    assert "resuming at 0.016 kimg" in capsys.readouterr().out
