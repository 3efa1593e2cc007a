"""The train command as a user meets it: what it refuses, in one line, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fastgan
from fastgan import checkpoint
from fastgan.cli import doctor, main, sample, train
from fastgan.config import Config
from fastgan.config.files import write_yaml
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.data.loading import dali
from fastgan.errors import ArgumentError
from fastgan.training import evaluator, run_directory
from fastgan.training.distributed.torch_engine import TorchEngine
from fastgan.training.from_config import validate_stages
from fastgan.training.intervals import checkpoint_kimg

ROOT = Path(__file__).resolve().parents[2]
TINY = "--width 8 --max-width 8 --latent 4 --batch 8 --resolution 8 --kimg 0.064 --samples 4".split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 255 - 20 * i)).save(path / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert train.main(["--variant", "dcgan", *TINY, "--out", str(path)]) == 0
    return path


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], *words: str) -> None:
    """The command exits with 2, says one line with these words, and writes nothing into the working folder."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--variant", "stylegan"], ("--variant", "stylegan", "pggan")),
        (["--preset", "tiny"], ("--preset", "tiny", "paper")),
        (["--preset", "paper-8-gpus", "--variant", "gan"], ("--preset", "paper-8-gpus", "paper, digits", "gan")),
        (["--lr-factor-at", "16", "0"], ("--lr-factor-at", "a factor above 0")),
        (["--resolution", "48"], ("--resolution", "48", "64")),
        (["--variant", "dcgan", "--resolution", "4"], ("--resolution", "4", "8")),
        (["--resolution", "2048"], ("--resolution", "2048", "1024")),
        (["--batch", "0"], ("--batch", "0", "at least 1")),
        (["--kimg", "-3"], ("--kimg", "-3")),
        (["--data", "nothing"], ("--data", "nothing", "a folder of images")),
        (["--data", "folder:missing"], ("--data", "missing")),
        (["--channels", "3"], ("--channels", "3", "digits")),
        (["--batch", "9", "--accumulation", "2"], ("--batch", "9", "multiple of 2")),
        (["--zero", "3"], ("--zero", "3", "second derivative")),
        (["--engine", "torch", "--zero", "1"], ("--engine", "deepspeed")),
        (["--sync-bn"], ("--sync-bn", "GPU")),
        (["--capture", "--device", "cpu"], ("--capture", "CUDA")),
        (
            ["--variant", "dcgan", "--norm-d", "batch", "--regularizer", "zero-centered", "--sync-bn"],
            ("--sync-bn", "second derivative", "--norm-d none"),
        ),
        (["--config", "missing.yaml"], ("--config", "missing.yaml")),
        (["--resume", "missing"], ("--resume", "missing")),
        (["--out", "/dev/null/run", *TINY], ("--out", "/dev/null/run")),
        (["--conditional"], ("--conditional", "sagan")),
        (["--seed", "-1"], ("--seed", "-1", "at least 0")),
        (["--seed", str(2**51)], ("--seed", str(2**51), "below 2**51")),
        (["--seed", str(2**64)], ("--seed", str(2**64), "below 2**51")),
        (["--variant", "sagan", "--attention-at", "12"], ("--attention-at", "12")),
    ],
)
def test_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, argv, *words)


@pytest.mark.parametrize("flag", ["--out", "--resume"])
def test_a_path_that_is_no_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, [*TINY, flag, os.fsdecode(b"o\xff")], f"{flag} must be a path in UTF-8, got 'o\\udcff'")


@pytest.mark.parametrize("flag", ["--config", "--resume", "--data"])
def test_a_flag_without_its_value_is_told_as_the_commands(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit):
        train.main([flag])
    error = capsys.readouterr().err
    assert "fastgan train: error: " in error and "__main__" not in error and "pytest" not in error


def test_lines_to_paste_are_quoted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "it's a run"
    flags = ["--variant", "dcgan", *TINY, "--out", str(out)]
    assert train.main(flags) == 0
    assert f"more with: fastgan sample {shlex.quote(str(out))}" in capsys.readouterr().out
    assert train.main(flags) == 2
    assert f"--resume {shlex.quote(str(out))}, or" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capsys, tmp_path, ["--device", "cuda", "--out", str(tmp_path / "run")], "--device", "cuda", "cpu")


def test_batch_that_does_not_divide_over_ranks() -> None:
    config = VARIANTS["dcgan"].config("digits")
    validate_stages(config, 2)
    with pytest.raises(ArgumentError, match=r"--batch must be a multiple of 3 at 16 px, got 64; 3 ranks"):
        validate_stages(config, 3)


def test_folder_with_no_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, tmp_path, ["--data", f"folder:{empty}", "--out", str(tmp_path / "r")], "--data", str(empty))
    (empty / "notes.txt").write_text("no image")
    refused(capsys, tmp_path, ["--data", f"folder:{empty}", "--out", str(tmp_path / "r")], "--data", str(empty))


def test_files_that_are_no_images_are_named_and_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    out = tmp_path / "run"
    argv = ["--variant", "dcgan", "--data", f"folder:{folder}", *TINY, "--resolution", "16", "--out", str(out)]
    assert train.main([*argv, "--dry-run"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert told[0].startswith("skipped broken.png: ") and told[1:] == ["skipped 1 file or folder; 12 images remain"]
    assert train.main(argv) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")] == told
    evaluated = ["evaluate", str(out), "--data", f"folder:{folder}", "--n", "4", "--metrics", "msssim"]
    assert main.main(evaluated) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")] == told
    assert fastgan.load(out).sample(2).shape == (2, 3, 16, 16)


def test_unknown_key_and_schema_in_a_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optimizer: {lr_q: 1}")
    refused(capsys, tmp_path, ["--config", str(file)], "lr_q", "lr_")
    file.write_text("schema: 99")
    refused(capsys, tmp_path, ["--config", str(file)], "schema", "99")
    file.write_text("optimizer: {lr_g: fast}")
    refused(capsys, tmp_path, ["--config", str(file)], "lr_g", "fast")


@pytest.mark.parametrize("key", ["variant", "preset"])
@pytest.mark.parametrize("value", ["[dcgan]", "{a: 1}", "3"])
def test_a_name_in_a_file_that_is_none(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, key: str, value: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{key}: {value}")
    words = (f"{file}: {key} must be ", f"got {yaml.safe_load(value)!r}", "dcgan" if key == "variant" else "paper")
    for flag, named in (("--config", file), ("--resume", tmp_path)):
        refused(capsys, tmp_path, [flag, str(named)], *words)


def test_another_preset_than_the_runs(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: paper")
    for flags in (("--preset", "paper"), ("--config", str(file))):
        words = ("--preset must be digits, got 'paper'", f"the run {run} was started with it")
        refused(capsys, run, ["--resume", str(run), *flags], *words)
    assert train.parse(["--resume", str(run), "--preset", "digits"]).preset == "digits"


def test_flags_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    request = train.parse(
        ["--variant", "sagan", "--norm-d", "none", "--clip", "0.5", "--width=16", "--evaluate-n", "9"]
    )
    assert request.notes == (
        "note: --clip has no effect with --regularizer none, only with weight-clipping",
        "note: --norm-d has no effect with --model sagan, only with dcgan",
        "note: --evaluate-n has no effect without --evaluate-kimg",
    )
    assert train.parse(["--variant", "wgan", "--norm-d", "none", "--clip", "0.5"]).notes == ()
    assert train.main(["--variant", "dcgan", "--fade-kimg", "1", "--dry-run"]) == 0
    assert "note: --fade-kimg has no effect with --model dcgan, only with pggan\n" in capsys.readouterr().out


def test_precedence_preset_file_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("variant: lsgan\noptimizer: {lr_g: 0.5, lr_d: 0.25}\nschedule: {batch: 16}")
    request = train.parse(["--config", str(file), "--lr-d", "0.125"])
    assert (request.variant, request.preset) == ("lsgan", "digits")
    o = request.config.optimizer
    assert (o.lr_g, o.lr_d, o.beta2) == (0.5, 0.125, VARIANTS["lsgan"].digits.optimizer.beta2)
    assert request.config.schedule.batch == 16
    assert train.parse(["--data", "synthetic"]).preset == "paper"
    assert train.parse(["--data", "synthetic", "--preset", "digits"]).preset == "digits"


def test_batches_of_a_preset_are_replaced_by_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag is there too where the preset, a file or the run that is gone on with has such batches."""
    paper = ["--variant", "pggan", "--preset", "paper"]
    assert train.parse(paper).config.schedule.batch_at == VARIANTS["pggan"].paper.schedule.batch_at
    assert train.parse([*paper, "--batch-at", "64", "32", "1024", "8"]).config.schedule.batch_at == {64: 32, 1024: 8}
    assert train.parse([*paper, "--batch-at"]).config.schedule.batch_at == {}
    with pytest.raises(SystemExit):
        train.parse([*paper, "--batch-at", "64"])
    assert "must be pairs of a resolution and a batch" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        train.parse([*paper, "--help"])
    assert "(default: 32 64 64 32 128 16 256 8 512 4)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_second_run_in_the_same_folder(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    refused(capsys, run, ["--variant", "dcgan", *TINY, "--out", str(run)], "--out", "already has a run", "--resume")


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "samples"])
def test_a_folder_with_what_a_run_left(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, name: str
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, old / name)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    refused(capsys, old, ["--variant", "dcgan", *TINY, "--out", str(old)], "--out", f"holds {name}", "new folder")
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert f"{tmp_path} has no checkpoint: it starts from the beginning\n" in capsys.readouterr().out


def test_a_run_killed_between_its_first_row_and_its_first_checkpoint_starts_again(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    config = train.parse(["--resume", str(run)]).config
    first = math.ceil(1000 * checkpoint_kimg(config) / config.schedule.batch) * config.schedule.batch
    (tmp_path / "metrics.jsonl").write_text(f'{{"images": {first}}}\n')
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert "it starts from the beginning" in capsys.readouterr().out
    assert checkpoint.existing(tmp_path)


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    """A disk that is not mounted: the record and the samples of the run stay as they are."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    last = checkpoint.existing(copy)[-1]
    (last / "checkpoint.json").rename(tmp_path / "checkpoint.json")
    for path in checkpoint.existing(copy):
        shutil.rmtree(path)
    record = (copy / "metrics.jsonl").read_bytes()
    assert record
    refused(capsys, copy, ["--resume", str(copy)], "--resume", "0.064 kimg", f"{last.name} has no checkpoint.json")
    shutil.rmtree(copy / "checkpoints")
    refused(capsys, copy, ["--resume", str(copy)], "--resume", "0.064 kimg", "there is none in checkpoints/")
    assert (copy / "metrics.jsonl").read_bytes() == record
    (copy / "metrics.jsonl").write_bytes(b"\xff\n")
    refused(capsys, copy, ["--resume", str(copy)], "--resume", "0.064 kimg", "there is none in checkpoints/")
    shutil.rmtree(copy / "samples")
    refused(capsys, copy, ["--resume", str(copy)], "--resume", "metrics.jsonl cannot be read, and there is none")


def test_a_run_killed_while_it_replaced_its_checkpoint_goes_on_from_it(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in checkpoint.existing(copy):
        path.rename(path.with_name(f".replaced-{path.name}"))
    assert train.main(["--resume", str(copy), "--kimg", "0.072"]) == 0
    assert "resuming at 0.064 kimg" in capsys.readouterr().out


def test_a_run_that_another_process_trains(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, new = tmp_path / "copy", tmp_path / "new"
    shutil.copytree(run, copy)
    new.mkdir()
    with run_directory.locked(copy, "--resume"), run_directory.locked(new, "--out"):
        refused(capsys, tmp_path, ["--resume", str(copy), "--kimg", "0.128"], "--resume", "another process trains")
        refused(capsys, tmp_path, ["--variant", "dcgan", *TINY, "--out", str(new)], "--out", "another process trains")
    # With its end the lock is gone, also within one process; and where there are no locks, one goes on without.
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
        assert train.main(["--resume", str(copy), "--kimg", "0.072"]) == 0
    assert train.main(["--resume", str(copy), "--kimg", "0.08"]) == 0


def test_a_run_that_another_start_made_meanwhile(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(wraps=run_directory.check_free, side_effect=[None, DEFAULT])
    monkeypatch.setattr(run_directory, "check_free", asked)
    refused(capsys, run, ["--variant", "dcgan", *TINY, "--out", str(run)], "--out", "already has a run")


def test_the_largest_seed(tmp_path: Path) -> None:
    assert train.main(["--variant", "dcgan", *TINY, "--seed", str(2**51 - 1), "--out", str(tmp_path / "run")]) == 0
    assert fastgan.load(tmp_path / "run").sample(2).isfinite().all()
    seed = evaluator.Evaluator(open_source("digits", 16), 300, "digits", 2**51 - 1, torch.device("cpu")).seed
    np.random.RandomState(seed)  # which torch-fidelity makes of it


def test_two_starts_in_one_second_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory, "default", lambda variant: Path(f"runs/{variant}-now"))
    other = run_directory.make(run_directory.default("dcgan"), named=False)
    assert train.main(["--variant", "dcgan", *TINY]) == 0
    assert sorted(Path("runs").iterdir()) == [other, Path("runs/dcgan-now.2")]
    assert checkpoint.existing(Path("runs/dcgan-now.2")) and not any(other.iterdir())


def test_a_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with run_directory.locked(tmp_path, "--resume"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with run_directory.locked(tmp_path, "--resume"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_run_that_is_being_left_is_waited_for(tmp_path: Path) -> None:
    held = run_directory.locked(tmp_path, "--resume")
    held.__enter__()
    end = threading.Timer(0.7, held.__exit__, (None, None, None))
    end.start()
    with run_directory.locked(tmp_path, "--resume", patience=30):
        end.join()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ArgumentError("--data", "a.png", "it is cut short"), "--data 'a.png': it is cut short"),
        (OSError(28, "No space"), "--out"),
    ],
)
def test_an_error_while_training_keeps_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("fastgan.training.trainer.Trainer.run", fail)
    assert train.main(["--variant", "dcgan", *TINY, "--out", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err.strip()
    assert words in text and len(text.splitlines()) == 1


def test_truncated_checkpoint(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = checkpoint.existing(copy)[-1]
    file = newest / "training.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    refused(capsys, copy, ["--resume", str(copy)], "--resume", "training.safetensors", "truncated")


@pytest.mark.parametrize("older", [False, True])
def test_another_optimizer_than_the_checkpoints(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = (copy / "config.yaml").read_bytes()
    if older:  # a checkpoint that does not say it: its run does
        stored = checkpoint.read(copy, "RUN")
        monkeypatch.setattr(checkpoint, "read", lambda *_: stored)
        assert stored.meta.pop("optimizer") == "adam"
    for name in ("sgd", "rmsprop"):
        words = (f"--optimizer must be adam, got '{name}'", "has its state")
        refused(capsys, copy, ["--resume", str(copy), "--optimizer", name, "--kimg", "0.128"], *words)
    assert (copy / "config.yaml").read_bytes() == before


def test_auto_is_the_run_that_was_trained_last(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = Path("runs/wgan-1"), Path("runs/wgan-2")
    for number, copy in enumerate((old, new, Path("runs/wgan-gp-3"))):
        shutil.copytree(run, copy)
        for file in copy.rglob("*"):
            os.utime(file, (1e9 + number, 1e9 + number))
    (old / "sample.png").touch()  # as `fastgan sample` does, which changes the folder's time, as another's of its files
    os.utime(old / "config.yaml")
    assert run_directory.newest(None, "wgan") == new
    for copy in (old, new):
        shutil.rmtree(copy / "checkpoints")
    assert run_directory.newest(None, "wgan") == old
    assert (
        run_directory.newest(None, "wgan-gp") == Path("runs/wgan-gp-3") and run_directory.newest(None, "dcgan") is None
    )


def test_growing_by_share_or_by_lengths(tmp_path: Path) -> None:
    """What a flag or a file gives takes the place of what the preset says in other words."""
    file = tmp_path / "config.yaml"

    def schedule(*flags: str) -> tuple[float | None, float | None, float | None]:
        s = train.parse(["--variant", "pggan", *flags]).config.schedule
        return s.fade_kimg, s.stable_kimg, s.grown_at

    assert schedule("--data", "synthetic") == (600, 600, None)
    assert schedule("--data", "synthetic", "--grown-at", "0.5") == (None, None, 0.5)
    assert schedule("--grown-at=0.5") == (None, None, 0.5)
    assert schedule("--fade-kimg", "5") == (5, None, None)
    file.write_text("schedule: {grown_at: 0.5}")
    assert schedule("--config", str(file), "--data", "synthetic") == (None, None, 0.5)
    assert schedule("--config", str(file), "--stable-kimg", "5") == (None, 5, None)
    for flag in ("--fade-kimg", "--stable_kimg"):
        with pytest.raises(ArgumentError, match=r"--grown-at 0\.5: "):
            schedule("--grown-at", "0.5", flag, "5")


def test_a_run_older_than_a_setting_goes_on_without_it(tmp_path: Path) -> None:
    write_yaml(train.parse(["--variant", "pggan"]).config, "pggan", "digits", tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert content["schedule"].pop("grown_at") is not None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    resumed = train.parse(["--resume", str(tmp_path)]).config.schedule
    assert resumed.grown_at is None and resumed.kimg == content["schedule"]["kimg"]


def test_what_a_run_leaves(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["schema"] == 1 and config["variant"] == "dcgan" and config["schedule"]["kimg"] == 0.064
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["images"] == 64 and {"loss_g", "loss_d", "images_per_second"} <= rows[-1].keys()
    assert list((run / "tensorboard").glob("events*"))
    with Image.open(sorted((run / "samples").glob("*.png"))[-1]) as grid:
        assert grid.size == (2 * 64, 2 * 64)
    assert checkpoint.existing(run)


def test_load_and_sample(run: Path) -> None:
    trained = fastgan.load(run)
    images = trained.sample(16, seed=0)
    assert images.shape == (16, 1, 8, 8) and images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert torch.allclose(trained.sample(4, seed=0), images[:4], atol=1e-6)
    assert not torch.allclose(trained.sample(4, seed=1), images[:4])
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        trained.sample(0)


def test_sample_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    assert sample.main([str(run), "--n", "9", "--out", str(out)]) == 0
    with Image.open(out) as grid:
        assert grid.size == (3 * 64, 3 * 64) and len(grid.getcolors() or []) > 1
    assert sample.main([str(run), "--n", "16", "--interpolate", "--out", str(out)]) == 0
    for argv, word in (
        ([str(tmp_path)], "RUN"),
        ([str(run), "--n", "0"], "--n"),
        ([str(run), "--n", "1000000000000"], "all images are in this machine's memory at once"),
        ([str(run), "--out", str(tmp_path / "x" / "y.png")], "--out"),
        ([str(run), "--out", "picture.jpg"], "--out"),
    ):
        capsys.readouterr()
        assert sample.main(argv) == 2
        error = capsys.readouterr().err
        assert word in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]
)
def test_more_samples_than_memory_holds(
    run: Path, error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("fastgan.generator.generate", full)
    assert sample.main([str(run), "--n", "5"]) == 2
    said = capsys.readouterr().err
    assert said == "fastgan: --n must be smaller, got 5; there is too little memory for all images\n"


def test_a_run_that_ends_below_its_resolution_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The published recipe takes 600 kimg for each step of its growth, whatever --kimg says."""
    flags = "--variant pggan --preset paper --fmap-max 8 --latent 8 --resolution 16 --batch 8 --kimg 0.008".split()
    warning = "warning: 0.008 kimg end at 4 px; raise --kimg, or lower --fade-kimg and --stable-kimg\n"
    assert train.main([*flags, "--dry-run"]) == 0 and warning in capsys.readouterr().out
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0 and warning in capsys.readouterr().out
    assert train.main([*flags, "--fade-kimg", "0", "--stable-kimg", "0", "--out", str(tmp_path / "whole")]) == 0
    assert "warning" not in capsys.readouterr().out


def test_rates_follow_the_resolution(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--variant pggan --resolution 8 --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --fade-kimg 0.016 "
    flags += "--stable-kimg 0.016 --kimg 0.064 --samples 4 --lr-g 1e-3 --lr-d 1e-3 --lr-factor-at 8 1.5"
    assert train.main([*flags.split(), "--dry-run"]) == 0
    assert "lr 0.001 (G) 0.001 (D), times 1.5 from 8 px on" in capsys.readouterr().out
    set_rate, seen = TorchEngine.set_rate, []
    monkeypatch.setattr(TorchEngine, "set_rate", lambda engine, rate: (seen.append(rate), set_rate(engine, rate)))
    assert train.main([*flags.split(), "--out", str(tmp_path / "run")]) == 0
    assert seen == [1e-3] * 4 + [1.5e-3] * 12  # both networks, two steps at 4 px, six at 8 px


def test_dry_run_prints_the_plan_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "synthetic", "--dry-run"]) == 0
    text = capsys.readouterr().out
    last = next(line for line in text.splitlines() if line.startswith(" 1024"))
    assert "23,086,795" in last and "23,087,249" in last and "GiB" in last
    words = text.splitlines()[-1].split()
    assert words[0] == "compiling," and words[-5:] == ["GiB", "more", "on", "each", "host"]
    assert float(words[-6]) == pytest.approx(2 + float(last.split()[-2]), abs=0.06)
    assert train.main(["--data", "synthetic", "--dry-run", "--compile", "off"]) == 0
    assert "compiling" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for word in (
        "torch",
        "deepspeed",
        "timm",
        "gradio",
        "cpu:",
        "freed memory:",
        "idle threads:",
        "pixel_norm",
        "scaled_dot_product_attention",
    ):
        assert word in text
    assert "  cpu: implementations: all by the shipped table (FASTGAN_QUALIFY=0)" in text.splitlines()


def test_doctor_names_what_is_missing_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("gradio", "timm") else "1.0")
    monkeypatch.setattr(doctor, "_torchvision_error", lambda: None)
    monkeypatch.setattr(dali, "missing", lambda: "it is not installed")
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("missing")
    assert [line for line in lines if re.search(r"\b(gradio|timm)\b", line)] == [
        "  timm (evaluate: --features dinov2): pip install 'fastgan[eval]'",
        "  gradio (explore): pip install 'fastgan[explore]'",
    ]
    assert [i > at for i, line in enumerate(lines) if "it is not installed" in line] == [True]


def test_fastgan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main.main(["trian"]) == 2
    assert capsys.readouterr().err.endswith("got 'trian'; did you mean train?\n")
    with pytest.raises(SystemExit):
        main.main(["sample"])
    told = capsys.readouterr().err
    assert "RUN" in told and "STR" not in told
    assert main.main(["train", "--variant", "x"]) == 2


def usage(line: list[str], folder: Path) -> str:
    result = subprocess.run([sys.executable, *line], capture_output=True, text=True, timeout=100, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
    return result.stdout


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main.main([command, "--help"])
    except SystemExit as exit:  # how argparse ends
        code = exit.code
    assert code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_launchers_have_files_to_start(command: str, tmp_path: Path) -> None:
    usage([str(ROOT / "fastgan" / f"{command}.py"), "--help"], tmp_path)


def test_the_package_is_a_command(tmp_path: Path) -> None:
    assert main.COMMANDS["sample"] in usage(["-m", "fastgan", "--help"], tmp_path)


def test_help_groups_flags_and_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--variant", "wgan", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for section in Config.__dataclass_fields__:
        assert f"{section} options" in text
    assert "(default: weight-clipping)" in " ".join(text.replace("│", " ").split())
