"""Generators that come with fastgan: by name wherever a run is named; a path of the same name wins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import fastgan
from benchmarks.studies import box_generator
from fastgan import checkpoint, models, trained
from fastgan.cli import main
from fastgan.errors import ArgumentError
from fastgan.export import formats
from fastgan.training.initial_weights import read_meta

FLAGS = "--variant dcgan --width 8 --max-width 8 --latent 4 --resolution 16 --batch 8 --kimg 0.064 --samples 4".split()
FREEZE = "--optimizer sgd --beta1 0 --lr-g 1e-12 --lr-d 1e-12 --regularizer none --kimg 0.008 --batch 8".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    assert main.main(["train", *FLAGS, "--log-kimg", "0.016", "--out", str(path)]) == 0
    return path


@pytest.fixture
def box(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A box with one generator, `small`, made as those of the package are; the working directory is empty."""
    folder = tmp_path / "box"
    box_generator.main([str(run), "small", "--command", "fastgan train", "--data-license", "BSD", "--out", str(folder)])
    monkeypatch.setattr(trained, "FOLDER", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_name_is_a_generator(box: Path, run: Path) -> None:
    assert trained.names() == ["small"]
    found, expected = fastgan.load("small").sample(8), fastgan.load(run).sample(8)
    assert 0 < (found - expected).abs().max() <= box_generator.LEVEL  # float16
    assert load_file(box / "small.safetensors").popitem()[1].dtype == torch.float16


def test_the_card_says_how_it_was_made(box: Path) -> None:
    card = (box / "small.md").read_text()
    for words in ("`fastgan train`", "| BSD |", "| digits |", "0.064 kimg", "float16", "apache-2.0", "Not measured."):
        assert words in card, words


def test_an_unknown_name_lists_those_there_are(box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ArgumentError, match=r"^RUN must be a run .*, or small, got 'smal'; there is no such file or folder$"
    ):
        fastgan.load("smal")
    for command in ("sample", "explore", "export", "evaluate"):
        assert "or small, got 'smal'" in refused(capsys, command, "smal"), command
    assert refused(capsys, "train", "--init-from", "smal").startswith("fastgan: --init-from must be a run ")


def test_a_path_wins(box: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("small").mkdir()  # pictures, perhaps
    where = f"the generator of this name that comes with fastgan is {box / 'small.safetensors'}"
    for argv in (["sample", "small"], ["export", "small"], ["train", "--init-from", "small"]):
        assert refused(capsys, *argv).endswith(where), argv
    Path("small").rmdir()
    shutil.copytree(run, "small")
    assert torch.equal(fastgan.load("small").sample(4), fastgan.load(run).sample(4))
    assert main.main(["sample", "small", "--n", "1"]) == 0
    assert Path("small/sample-seed0.png").is_file()


def test_commands_take_a_name_and_write_here(box: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(box.rglob("*"))
    assert main.main(["sample", "small", "--n", "4"]) == 0
    assert main.main(["export", "small"]) == 0
    assert main.main(["evaluate", "small", "--n", "64", "--metrics", "msssim"]) == 0
    output = capsys.readouterr().out
    assert (
        "dcgan at 0.064 kimg: 64 images of 16 px against 1,797 real ones of digits" in output and "added" not in output
    )
    assert sorted(path.name for path in Path().iterdir()) == ["small-export", "small-sample-seed0.png"]
    assert "license: apache-2.0" in Path("small-export/README.md").read_text()
    assert sorted(box.rglob("*")) == before


def test_a_run_starts_from_a_name(box: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--init-from", "small", *FREEZE, "--out", "new"]) == 0
    assert "the discriminator starts from new weights" not in capsys.readouterr().out
    before, after = (checkpoint.read(path, "RUN") for path in (run, Path("new")))
    found = after.training()
    for group, expected in (("generator", before.generator()), ("discriminator", before.training()["discriminator"])):
        weights = [name for name in expected if name.endswith("weight")]
        assert weights
        for name in weights:
            torch.testing.assert_close(found[group][name], expected[name].half().float())
    assert read_meta("small")["variant"] == "dcgan"


def test_without_its_discriminator_a_run_says_so(box: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So too for any export: it has a generator alone."""
    (box / "small.discriminator.safetensors").unlink()
    assert main.main(["train", "--init-from", "small", *FREEZE, "--out", "new"]) == 0
    line = f"--init-from: {box / 'small.safetensors'} has a generator alone; the discriminator starts from new weights"
    assert line in capsys.readouterr().out.splitlines()
    found, trained_one = (checkpoint.read(path, "RUN").training() for path in (Path("new"), run))
    torch.manual_seed(16)  # seed 0 of the run, 16 px
    _, new = models.build(**checkpoint.read(run, "RUN").meta["networks"])
    for name, tensor in new.state_dict().items():
        if name.endswith("weight"):
            torch.testing.assert_close(found["discriminator"][name], tensor)
            assert not torch.allclose(trained_one["discriminator"][name], tensor)


def test_damaged_files_to_start_from_are_one_line(
    box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = box / "small.discriminator.safetensors"
    shutil.copy(box / "small.safetensors", file)
    assert "it does not fit: weight" in refused(capsys, "train", "--init-from", "small", *FREEZE)
    file.write_bytes(b"no")
    assert refused(capsys, "train", "--init-from", "small", *FREEZE).startswith("fastgan: --init-from must be a safet")
    bad = {name: torch.full_like(x, torch.nan) if x.is_floating_point() else x
           for name, x in load_file(box / "small.safetensors").items()}  # fmt: skip
    meta = formats.read_meta(box / "small.safetensors")
    file.write_bytes(formats.FORMATS["safetensors"].write(_Stored(bad), meta, None))  # type: ignore[arg-type]
    assert "is not finite" in refused(capsys, "train", "--init-from", "small", *FREEZE)
    program = Path("model.onnx")
    program.write_bytes(b"")
    assert "must be a run, a checkpoint or a .safetensors export" in refused(
        capsys, "train", "--init-from", str(program), *FREEZE
    )


class _Stored:
    """Something with a state dict."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state


@pytest.mark.parametrize("name", trained.names() or ["none: the package has no generator"])
def test_generators_of_the_package(name: str) -> None:
    generator = fastgan.load(trained.FOLDER / f"{name}.safetensors")
    images = generator.sample(4)
    assert images.shape[1] in (1, 3) and images.shape[2] == generator.meta["networks"]["resolution"]
    assert F.mse_loss(images[0], images[1]) > 1e-3 and generator.meta["license"]
    card = trained.FOLDER / f"{name}.md"
    for words in ("License of the data", "Command", "Machine", f"fastgan.load('{name}')"):
        assert words in card.read_text(), words
    critic = trained.discriminator_of(trained.FOLDER / f"{name}.safetensors")
    assert critic is not None
    assert not models.misfit(generator.meta["networks"], formats.read_weights(critic), discriminator=True)
    assert sum(file.stat().st_size for file in trained.FOLDER.rglob(f"{name}.*")) < 4e6
