"""`--init-from`: a new run starts from the weights of another, on other data, at its resolution or above."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import noise, save
from safetensors.torch import load_file

import fastgan
from fastgan import checkpoint
from fastgan.cli import train
from fastgan.config import Config, replace
from fastgan.config.growth import stages_of

SMALL = "--width 8 --max-width 8 --latent 4 --batch 8 --kimg 0.016 --samples 1".split()
PGGAN = "--variant pggan --fmap-base 32 --fmap-max 8 --latent 4 --batch 8 --kimg 0.032 --samples 1".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dcgan of 8 px on digits."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train.main(["--variant", "dcgan", *SMALL, "--resolution", "8", "--out", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pggan of 8 px on digits."""
    run = tmp_path_factory.mktemp("grown") / "run"
    assert train.main([*PGGAN, "--resolution", "8", "--out", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(9):
        save(folder / f"{i}.png", noise(32, 32, seed=i))
    return folder


def weights(run: Path, index: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.existing(run)[index] / "training.safetensors")


def test_a_new_run_begins_with_the_weights_of_another(trained: Path, photos: Path, tmp_path: Path) -> None:
    """Nothing but the run and the data is named: networks, variant and resolution are those of the weights."""
    flags = ["--data", f"folder:{photos}", "--init-from", str(trained), "--kimg", "0.008", "--lr-g", "1e-12"]
    fixed = ["--lr-d", "1e-12", "--batch", "8", "--samples", "1", "--regularizer", "none", "--ema-decay", "0.5"]
    assert train.main([*flags, *fixed, "--optimizer", "sgd", "--beta1", "0", "--out", str(tmp_path / "run")]) == 0
    before, after = weights(trained, -1), weights(tmp_path / "run", -1)
    learned = [name for name in before if name.startswith("generator:") and name.endswith("weight")]
    assert learned
    for name in learned:
        torch.testing.assert_close(after[name], before[name])
    assert checkpoint.read(tmp_path / "run", "RUN").meta["images"] == 8
    assert fastgan.load(tmp_path / "run").sample(1).shape == (1, 1, 8, 8)
    # A resume does not start from them again, and does not need them.
    (trained / "config.yaml").rename(trained / "away.yaml")
    assert train.main(["--resume", str(tmp_path / "run"), "--kimg", "0.016"]) == 0
    (trained / "away.yaml").rename(trained / "config.yaml")


def test_progressive_networks_grow_on(grown: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--data", f"folder:{photos}", "--init-from", str(grown), "--resolution", "32", "--kimg", "0.048"]
    assert train.main([*flags, "--batch", "8", "--samples", "1", "--checkpoint-kimg", "0.001", "--keep", "99",
                       "--fade-kimg", "0.008", "--stable-kimg", "0.008", "--out", str(run)]) == 0  # fmt: skip
    found = [checkpoint.read(path, "RUN").meta["resolution"] for path in checkpoint.existing(run)]
    assert found[0] == 8 and found[-1] == 32 and found == sorted(found)
    assert train.main(["--resume", str(run), "--kimg", "0.056"]) == 0


def test_stages_begin_at_the_first_resolution() -> None:
    schedule = {"resolution": 32, "kimg": 30.0, "first_resolution": 8}
    stages = stages_of(replace(Config(), networks={"model": "pggan"}, schedule=schedule))
    assert [(stage.resolution, stage.start, stage.fade_end) for stage in stages] == [
        (8, 0, 0),
        (16, 10_000, 15_000),
        (32, 20_000, 25_000),
    ]
    assert [stage.alpha(0) for stage in stages[:1]] == [1.0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--init-from", "nowhere"], "--init-from must be a run with a checkpoint"),
        (["--init-from", "TRAINED", "--latent", "5"], "--latent must be 4, got 5; the weights of"),
        (["--init-from", "TRAINED", "--resolution", "16"], "--resolution must be 8, got 16; the weights of"),
        (["--init-from", "TRAINED", "--data", "synthetic", "--channels", "3"], "--channels must be 1, got 3"),
        (["--init-from", "GROWN", "--resolution", "4"], "--first-resolution must be 4 at 4 px, got 8"),
        (["--init-from", "GROWN", "--first-resolution", "4"], "--first-resolution must be 8, got 4; the weights of"),
        (["--init-from", "TRAINED", "--variant", "pggan"], "--variant must be dcgan, lsgan, wgan, wgan-gp, wgan-div"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    trained: Path, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    flags = [str({"TRAINED": trained, "GROWN": grown}.get(flag, flag)) for flag in flags]
    capsys.readouterr()
    assert train.main([*flags, "--kimg", "0.008", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()
