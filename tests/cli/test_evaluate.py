"""The evaluate command, and evaluation during training."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgan import checkpoint
from fastgan.cli import evaluate, main, train
from fastgan.data import open_source
from fastgan.errors import ArgumentError
from fastgan.evaluation import measure
from fastgan.evaluation.of_generator import drawer
from fastgan.evaluation.table import format_table
from fastgan.generator import load
from fastgan.training.evaluator import unwritable

TINY = "--width 8 --max-width 8 --latent 4 --batch 8 --resolution 16 --samples 4".split()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastgan" / "evaluation"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "run"
    assert train.main(["--variant", "dcgan", *TINY, "--kimg", "0.064", "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str) -> None:
    """The command exits with 2, prints one line with these words, and writes no record."""
    capsys.readouterr()
    assert main.main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error
    assert not (Path(argv[0]) / "evaluation.jsonl").exists()


def test_a_run_is_evaluated_and_the_record_grows(run: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", str(run), "--n", "64", "--metrics", "fid,is, prdc,modes"]
    assert main.main(argv) == 0
    output = capsys.readouterr()
    assert "dcgan at 0.064 kimg: 64 images of 16 px against 1,797 real ones of digits" in output.out
    assert "Frechet distance (digits features)" in output.out and "FID" not in output.out and "KID" not in output.out
    assert "of 10;" in output.out and "k = 3, 64 images of each" in output.out
    assert "warning: fid: 64 generated images for 1,024 features: their covariance is singular" in output.err
    (line,) = lines(run)
    names = "frechet_distance precision recall density coverage memorized class_score class_score_std".split()
    assert sorted(line["metrics"]) == sorted([*names, "modes", "confident", "kl", "modes_of"])
    assert line["images"] == {"generated": 64, "real": 1797, "neighbors": 64}
    assert (line["features"], line["data"], line["resolution"], line["kimg"]) == ("digits", "digits", 16, 0.064)
    assert line["resize"] == "bilinear, antialiased, to 16 px" and "singular" in line["warnings"][0]
    assert line["fingerprint"] == open_source("digits", 16).fingerprint and line["version"]
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    assert not list(run.glob(".evaluation*"))
    # Again, with the real images from the cache. An incomplete line in the record does not affect the new one.
    with (run / "evaluation.jsonl").open("ab") as file:
        file.write(b'{"kimg": \xff')
    assert main.main(argv) == 0
    rows = (run / "evaluation.jsonl").read_text(errors="replace").splitlines()
    assert len(rows) == 3 and json.loads(rows[0]) == json.loads(rows[2]) == line


def test_numbers_are_printed_if_the_record_cannot_be_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["evaluate", str(run), "--n", "16", "--metrics", "msssim"]
    # Makes the record unwritable, but not the folder, which is checked before.
    (run / f".evaluation.jsonl.{os.getpid()}.part").mkdir()
    assert main.main(argv) == 2
    output = capsys.readouterr()
    table, line = output.out.strip().splitlines()[-2:]
    assert "MS-SSIM of pairs" in table and json.loads(line)["images"]["generated"] == 16
    assert output.err.strip().splitlines()[-1].startswith(f"fastgan: RUN '{run}': its record cannot be written (")
    monkeypatch.setattr("fastgan.training.evaluator.unwritable", lambda run: "Read-only file system")
    assert main.main(argv) == 2
    output = capsys.readouterr()
    assert output.err.startswith(
        f"warning: {run} cannot be written (Read-only file system): the numbers are only printed"
    )
    assert "MS-SSIM of pairs" in output.out


def test_pixel_metrics_need_no_features(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the default features for most data may not be there."""

    def offline(*args: object) -> None:
        raise ArgumentError("--features", args[0], "its weights cannot be downloaded")

    monkeypatch.setattr("fastgan.evaluation.features.open_extractor", offline)
    argv = ["evaluate", str(run), "--data", "synthetic", "--n", "16", "--metrics"]
    gray = open_source("synthetic", 16, 1)
    monkeypatch.setattr("fastgan.data.open_source", lambda **_: gray)
    assert main.main([*argv, "swd,msssim"]) == 0
    assert "features: none" in capsys.readouterr().out
    (line,) = lines(run)
    assert line["features"] is line["feature_weights"] is line["resize"] is None
    assert {"swd", "ms_ssim"} < set(line["metrics"])
    assert main.main([*argv, "swd,kid"]) == 2
    assert "--features 'efficientnet-lite0': its weights" in capsys.readouterr().err


def test_names_in_the_table_depend_on_the_features() -> None:
    numbers = {
        "frechet_distance": 12.345, "kernel_distance": 0.0125, "kernel_distance_std": 0.001, "class_score": 7.5,
        "class_score_std": 0.25, "precision": 0.75, "recall": 0.5, "density": 1.25, "coverage": 0.875,
        "swd": 0.02, "swd_level0": 0.03, "swd_level1": 0.01, "ms_ssim": 0.25, "ms_ssim_real": 0.125,
        "modes": 9, "modes_of": 10, "confident": 0.625, "kl": 0.0625,
    }  # fmt: skip
    line = {"metrics": numbers, "images": {"neighbors": 1000, "swd": 1200}, "resolution": 32}
    rows = [" ".join(row.split()) for row in format_table({**line, "features": "inception-v3-compat"}).splitlines()]
    assert rows[:3] == [
        "FID 12.35 lower is better",
        "KID 0.0125 ± 0.001 over subsets",
        "inception score 7.5 ± 0.25 over tenths; higher is better",
    ]
    assert rows[3:] == [
        "precision 0.7500 k = 3, 1,000 images of each",
        "recall 0.5000 k = 3, 1,000 images of each",
        "density 1.2500 k = 5, 1,000 images of each; 1 for real images",
        "coverage 0.8750 k = 5, 1,000 images of each",
        "sliced Wasserstein x 10^3 20.00 30.00 at 32 px, 10.00 at 16 px; 1,200 images of each",
        "MS-SSIM of pairs 0.2500 real images: 0.1250",
        "modes 9 of 10; 62.5% of images are confident",
        "KL of the modes 0.0625 nats, KL(generated || real)",
    ]
    other = [" ".join(row.split()) for row in format_table({**line, "features": "vgg16"}).splitlines()]
    assert [row.partition(" (vgg16 features) ")[0] for row in other[:5]] == [
        *("Frechet distance", "kernel distance", "class score", "precision", "recall")
    ]


def test_unwritable_gives_the_reason(tmp_path: Path) -> None:
    assert unwritable(tmp_path) == "" and not list(tmp_path.iterdir())
    assert unwritable(tmp_path / "nothing") == "No such file or directory"


def test_one_checkpoint_other_data_and_another_seed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 99)).save(tmp_path / "pictures" / f"{i}.png")
    one = checkpoint.existing(run)[-1]
    argv = [str(one), "--data", f"folder:{tmp_path / 'pictures'}", "--features", "digits", "--n", "20"]
    assert evaluate.main([*argv, "--metrics", "prdc,msssim"]) == 0
    assert evaluate.main([*argv, "--metrics", "prdc,msssim", "--seed", "1"]) == 0
    first, second = lines(run)
    assert first["data"] == "folder" and first["images"]["real"] == 8 and first["seed"] == 0 and second["seed"] == 1
    assert first["metrics"]["ms_ssim"] != second["metrics"]["ms_ssim"]
    assert first["metrics"]["ms_ssim_real"] == second["metrics"]["ms_ssim_real"]


def test_the_card_of_an_export_has_the_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["evaluate", str(run), "--n", "64", "--metrics", "msssim,modes"]) == 0
    (line,) = lines(run)
    assert main.main(["export", str(run)]) == 0
    card = (run / "export" / "README.md").read_text()
    assert f"| ms_ssim | {line['metrics']['ms_ssim']:.4g} | digits | 64 |" in card
    # The export in the run's folder has the run's data; its numbers are printed, and not added to the record.
    assert main.main(["evaluate", str(run / "export" / "model.safetensors"), "--n", "64", "--metrics", "msssim"]) == 0
    output = capsys.readouterr()
    assert f"{line['metrics']['ms_ssim']:.4f}" in output.out and "against 1,797 real ones of digits" in output.out
    assert lines(run) == [line]
    # A file elsewhere does not say where its data are.
    alone = shutil.copytree(run / "export", run.parent / "alone") / "model.safetensors"
    refused(capsys, [str(alone)], "--data must name the real images, got None; ")
    assert main.main(["evaluate", str(alone), "--data", "digits", "--n", "64", "--metrics", "msssim"]) == 0
    assert f"{line['metrics']['ms_ssim']:.4f}" in capsys.readouterr().out
    assert sorted(alone.parent.iterdir()) == [alone.parent / name for name in ("README.md", "config.json", alone.name)]


def test_invalid_arguments(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(run)
    refused(
        capsys, [name, "--metrics", "fid,lpips"], "--metrics must be fid, kid, is, prdc, swd, msssim, modes", "'lpips'"
    )
    refused(capsys, [name, "--metrics", ","], "--metrics must be ", "got ','")
    refused(capsys, [name, "--n", "0"], "--n must be at least 1, got 0")
    refused(capsys, [name, "--n", "1", "--metrics", "fid"], "--n must be at least 2 for fid, got 1")
    refused(capsys, [name, "--seed", "-1"], "--seed must be 0 to 4294967295, got -1")
    refused(capsys, [name, "--seed", str(2**32)], "--seed must be 0 to 4294967295, got 4294967296")
    refused(capsys, [name, "--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'")
    refused(capsys, [name, "--features", "resnet"], "--features must be ", "inception-v3-compat", "got 'resnet'")
    refused(capsys, [name, "--feature-weights", "x.pth"], "--feature-weights 'x.pth': is not needed")
    refused(capsys, [name, "--data", "stacked-digits"], "--data 'stacked-digits': the run's images have 1 channel (")
    refused(capsys, [name, "--data", "imagenet"], "--data ", "'imagenet'")
    refused(capsys, [name, "--data", "synthetic", "--features", "digits", "--metrics", "modes"], "modes are known")
    refused(capsys, [str(tmp_path / "nothing")], "RUN must be a run with a checkpoint or an exported file, or ")
    refused(capsys, [str(tmp_path)], "RUN must be a run directory, a checkpoint in one, or an exported file, got")
    if not torch.cuda.is_available():
        refused(capsys, [name, "--device", "cuda"], "--device must be cpu, got 'cuda'; torch sees no GPU here")


def test_data_smaller_than_the_runs_images(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example a prepared set of 8 px: its images cannot be enlarged."""
    small = open_source("digits", 8)
    monkeypatch.setattr("fastgan.data.open_source", lambda **_: small)
    refused(capsys, [str(run), "--data", "small"], "--data 'small': the run's images have 16 px", "4 to 8")


def test_data_is_opened_with_the_runs_seed_and_needs_its_classes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run / "config.yaml"
    config.write_text(re.sub("seed: 0", "seed: 5", config.read_text()))
    argv: list[tuple[object, ...]] = []

    def opened(**given: object) -> Any:
        argv.append(given)
        return source

    monkeypatch.setattr("fastgan.data.open_source", opened)
    source = open_source("digits", 16)
    networks = {"channels": 1, "resolution": 16, "num_classes": 10}
    settings = evaluate._read_config(run)
    assert evaluate._open_data(evaluate.Evaluate(str(run)), settings, networks) is source
    expected = {"spec": "digits", "resolution": 16, "channels": 1, "seed": 5, "fit": "crop", "background": "white"}
    assert argv == [expected]
    with pytest.raises(ArgumentError, match="--data 'digits': the run has 4 classes, not 10"):
        evaluate._open_data(evaluate.Evaluate(str(run)), settings, {**networks, "num_classes": 4})
    source.num_classes, source.labels = 0, None  # image i then has label i mod 10
    assert evaluate._open_data(evaluate.Evaluate(str(run)), settings, networks) is source


def test_a_run_without_an_average_or_without_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = checkpoint.existing(run)[-1]
    (newest / "generator.safetensors").unlink()
    refused(capsys, [str(run)], "RUN '", "generator.safetensors is missing")
    shutil.rmtree(run / "checkpoints")
    refused(capsys, [str(run)], "RUN ", "a run with a checkpoint")


def test_an_interrupt_before_anything_is_stored(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(indices: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    stopped: list[bool] = []
    monkeypatch.setattr("fastgan.evaluation.of_generator.drawer", lambda *_: interrupted)
    monkeypatch.setattr("fastgan.training.distributed.rendezvous.stop", lambda: stopped.append(True))
    assert evaluate.main([str(run), "--n", "64", "--metrics", "msssim"]) == 130
    output = capsys.readouterr().err
    assert output.endswith("fastgan: interrupted\n") and "resumes" not in output and stopped == [True]


def test_an_interrupted_command_resumes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(run), "--n", "64", "--metrics", "modes,msssim"]
    assert evaluate.main(argv) == 0
    whole = lines(run)[0]
    (run / "evaluation.jsonl").unlink()
    monkeypatch.setattr("fastgan.evaluation.collect._SAVE_SECONDS", 0.0)
    monkeypatch.setattr(measure.Evaluation, "_batch_size", lambda *_: 16)
    with monkeypatch.context() as patch:
        generate, calls = drawer, []

        def breaking(*args: Any) -> Any:
            inner = generate(*args)

            def draw(indices: torch.Tensor) -> torch.Tensor:
                calls.append(len(indices))
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return inner(indices)

            return draw

        patch.setattr("fastgan.evaluation.of_generator.drawer", breaking)
        assert evaluate.main(argv) == 130
    kept = "the statistics so far are stored; the same command resumes"
    assert capsys.readouterr().err.splitlines()[-2:] == [kept, "fastgan: interrupted"]
    assert len(list(run.glob(".evaluation-*.rank0of1"))) == 1 and not (run / "evaluation.jsonl").exists()
    assert evaluate.main(argv) == 0
    assert lines(run)[0]["metrics"]["modes"] == whole["metrics"]["modes"]
    assert lines(run)[0]["metrics"]["ms_ssim"] == pytest.approx(whole["metrics"]["ms_ssim"], rel=1e-6)
    assert not list(run.glob(".evaluation-*"))


def test_an_evaluation_does_not_resume_another(run: Path) -> None:
    """Of another checkpoint, seed, number of images, data, features or metrics."""
    argv, source = evaluate.Evaluate(str(run)), open_source("digits", 16)
    other = open_source("digits", 16)
    other.fingerprint = "f" * 16
    checkpoints: list[dict[str, Any]] = [{"generator": size} for size in (1, 2)]
    extractors: list[Any] = [None, SimpleNamespace(fingerprint="a"), SimpleNamespace(fingerprint="b")]
    others = [dataclasses.replace(argv, seed=1), dataclasses.replace(argv, n=7)]
    given = [
        *((one, checkpoints[0], source, None, ["swd"]) for one in (argv, *others)),
        (argv, checkpoints[1], source, None, ["swd"]),
        (argv, checkpoints[0], other, None, ["swd"]),
        *((argv, checkpoints[0], source, one, ["swd"]) for one in extractors[1:]),
        (argv, checkpoints[0], source, None, ["swd", "msssim"]),
    ]
    names = {evaluate._partial_file(run, *one) for one in given}
    assert len(names) == len(given) and names == {evaluate._partial_file(run, *one) for one in given}


def test_an_image_depends_on_its_index(run: Path) -> None:
    trained = load(run)
    source = open_source("digits", 16)
    draw = drawer(trained.module, trained.meta["networks"], source, 3)
    whole = draw(torch.arange(10))
    assert whole.dtype == torch.uint8 and torch.equal(draw(torch.tensor([7, 2])), whole[[7, 2]])
    assert torch.equal(whole, ((trained.sample(10, seed=3) + 1) * 127.5).round().to(torch.uint8))


def test_labels_have_the_frequencies_of_the_data() -> None:
    class Echo(torch.nn.Module):
        """Images whose pixels are the label."""

        latent = 2

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return (labels / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)

    source = open_source("digits", 4)
    source.labels[source.labels > 3] = 3
    draw = drawer(Echo(), {"num_classes": 10, "resolution": 4, "latent": 2}, source, 0)
    labels = draw(torch.arange(2000))[:, 0, 0, 0]
    share = torch.bincount(labels, minlength=10) / 2000
    assert share[:4].tolist() == pytest.approx([0.099, 0.101, 0.099, 0.701], abs=0.04) and share[4:].sum() == 0
    source.labels = None
    assert draw(torch.arange(12))[:, 0, 0, 0].tolist() == [*range(10), 0, 1]


def test_evaluation_during_training(tmp_path: Path) -> None:
    """At regular intervals and at the end; the trained weights stay the same."""
    base = ["--variant", "dcgan", *TINY, "--kimg", "0.2", "--log-kimg", "0.05", "--deterministic"]
    assert train.main([*base, "--every", "0.08", "--evaluate-n", "16", "--out", str(tmp_path / "run")]) == 0
    assert train.main([*base, "--out", str(tmp_path / "plain")]) == 0
    rows = lines(tmp_path / "run")
    assert [row["kimg"] for row in rows] == [0.08, 0.16, 0.2]
    assert all(row["images"]["generated"] == 16 and row["features"] == "digits" for row in rows)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in logged if "evaluation/frechet_distance" in row]
    assert [row["images"] for row in logged] == [80, 160, 200]
    assert logged[1]["evaluation/precision"] == rows[1]["metrics"]["precision"]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    seen = events.Scalars("evaluation/frechet_distance")
    assert [event.step for event in seen] == [80, 160, 200]
    assert seen[2].value == pytest.approx(rows[2]["metrics"]["frechet_distance"], rel=1e-6)
    one, other = (
        load_file(checkpoint.existing(tmp_path / name)[-1] / "generator.safetensors") for name in ("run", "plain")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "plain" / "evaluation.jsonl").exists()


def test_unknown_features_stop_a_run_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--variant", "dcgan", *TINY, "--kimg", "0.064", "--every", "0.01", "--out", str(tmp_path / "run")]
    assert train.main([*argv, "--evaluate-features", "resnet"]) == 2
    assert "--evaluate-features must be digits, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train.main([*argv, "--evaluate-n", "0"]) == 2
    assert "--evaluate-n must be at least 1, got 0" in capsys.readouterr().err


def test_too_few_images_to_evaluate_stop_a_run_before_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--variant", "dcgan", *TINY, "--kimg", "0.064", "--every", "0.01"]
    assert train.main([*base, "--out", str(tmp_path / "run"), "--evaluate-n", "5"]) == 2
    assert "--evaluate-n must be at least 6 for prdc, got 5" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/samples/*")) and not list(tmp_path.glob("run/checkpoints/*"))
    (tmp_path / "few").mkdir()
    for i in range(4):
        Image.new("L", (16, 16), 30 * i).save(tmp_path / "few" / f"{i}.png")
    argv = [*base, "--data", f"folder:{tmp_path / 'few'}", "--evaluate-features", "digits"]
    assert train.main([*argv, "--out", str(tmp_path / "other")]) == 2
    assert "--data 'folder': it has 4 images, and prdc needs at least 6" in capsys.readouterr().err
    assert not list(tmp_path.glob("other/samples/*")) and not list(tmp_path.glob("other/checkpoints/*"))
