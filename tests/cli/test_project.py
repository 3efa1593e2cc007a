"""`fastgan project`: a generated image is recovered; any picture is fitted; every fault is one line."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import build, make_run
from safetensors import safe_open
from safetensors.torch import load_file

from fastgan import projection
from fastgan.cli import main
from fastgan.errors import ArgumentError
from fastgan.evaluation import lite0
from fastgan.export.formats import ExportedModule
from fastgan.generator import TrainedGenerator, generate, load


def trained_generator(case: str) -> TrainedGenerator:
    generator, networks = build(case)
    return TrainedGenerator(generator, {"networks": networks})


def picture(path: Path, size: tuple[int, int] = (37, 91), mode: str = "RGB") -> Path:
    shape = (size[1], size[0], *((3,) if mode == "RGB" else ()))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("case", ["mlp", "pggan-4"])
def test_a_generated_image_is_recovered(case: str) -> None:
    trained = trained_generator(case)
    target = trained.sample(3, seed=5)[2:]
    found = projection.project(trained, target, seed=1, steps=100)
    untouched = projection.project(trained, target, seed=1, steps=0, starts=1)
    assert found.error < 1.0 and found.error < 0.2 * untouched.error, (found.error, untouched.error)
    torch.testing.assert_close(found.image, generate(trained.module, found.latent, None, found.image.shape[-1]))
    short = [projection.project(trained, target, seed=seed, steps=5) for seed in (1, 1, 2)]
    assert torch.equal(short[0].latent, short[1].latent) and short[0].error == short[1].error
    assert not torch.equal(short[0].latent, short[2].latent)


def test_the_class_is_found_or_kept() -> None:
    trained = trained_generator("sagan-classes")
    latent = torch.randn(1, trained.latent)
    target = generate(trained.module, latent, torch.tensor([2]), 8)
    found = projection.project(trained, target, steps=30)
    assert found.label is not None and found.label.tolist() == [2]
    kept = projection.project(trained, target, steps=2, label=1)
    assert kept.label is not None and kept.label.tolist() == [1] and kept.error > found.error


def test_neighbors_are_farther_in_each_row() -> None:
    trained = trained_generator("dcgan")
    found = projection.project(trained, trained.sample(1), steps=20)
    rows = projection.neighbors(trained, found, columns=6).unflatten(0, (5, 6))
    distances = (rows - found.image).square().mean((1, 2, 3, 4))
    assert (distances.diff() > 0).all() and distances[0] > 0


def test_features_have_gradients() -> None:
    """At 32 px and above the network's features are compared too; it needs its package."""
    generator, networks = build("pggan")
    networks = {**networks}
    trained = TrainedGenerator(generator, {"networks": networks})
    device = torch.device("cpu")
    assert projection.feature_network(16, device) is None and projection.feature_network(32, device, "none") is None
    network = projection.feature_network(32, device)
    assert isinstance(network, lite0.EfficientNetLite0) == (lite0.weights_file() is not None)
    gray = torch.rand(2, 1, 32, 32, requires_grad=True)
    for channels in (1, 3, 4):
        images = gray.expand(-1, channels, -1, -1)
        distance = projection._distance(torch.zeros(1, channels, 32, 32), network)
        (gradient,) = torch.autograd.grad(distance(images).sum(), gray)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0, channels
    target = trained.sample(2, seed=3)[1:, :1].expand(-1, 2, -1, -1)
    assert projection.project(trained, target, steps=2, starts=1).latent.shape == (1, trained.latent)


@pytest.mark.parametrize(("size", "mode"), [((37, 91), "RGB"), ((3, 3), "L"), ((400, 20), "RGB")])
def test_pictures_of_any_size_are_fitted(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    file = picture(tmp_path / "a.png", size, mode)
    for fit in ("crop", "pad", "stretch"):
        for channels in (1, 3, 4):
            found = projection.read_picture(file, 8, channels, fit)  # type: ignore[arg-type]
            assert found.shape == (1, channels, 8, 8) and found.abs().max() <= 1


def test_a_failing_disk_is_not_a_damaged_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = picture(tmp_path / "a.png", (8, 8), "RGB")

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(projection, "read_regular", fail)
    with pytest.raises(ArgumentError, match="cannot be read now"):
        projection.read_picture(file, 8, 3)


def test_the_command_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "sagan-classes-gray")
    image = tmp_path / "photo.of.me.png"
    Image.fromarray(((load(run).sample(1)[0, 0] + 1) * 127.5).byte().numpy()).save(image)
    assert main.main(["project", str(run), str(image), "--steps", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "class " in lines[0] and "levels (root mean square)" in lines[0]
    stem = run / "photo.of.me"
    assert lines[1:] == [f"{stem}-projection.png", f"{stem}-neighbors.png", f"{stem}-projection.safetensors"]
    assert Image.open(lines[1]).size == (128, 64) and Image.open(lines[2]).size == (8 * 64, 5 * 64)
    stored = load_file(lines[3])
    assert stored["latent"].shape == (1, 6) and stored["label"].shape == (1,)
    with safe_open(lines[3], "pt") as file:
        facts = json.loads(file.metadata()["fastgan"])
    assert facts["picture"] == image.name and facts["seed"] == 0 and facts["error"] >= 0
    assert main.main(["project", str(run), str(image), "--steps", "1", "--out", str(tmp_path / "new" / "folder")]) == 0
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 3


def test_faults_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, image = make_run(tmp_path / "run", "dcgan-gray"), picture(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "a file").write_text("")

    def refused(*argv: str) -> str:
        capsys.readouterr()
        assert main.main(["project", *map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    name, photo = str(run), str(image)
    assert "RUN must be a run with a checkpoint" in refused(str(tmp_path / "none"), photo)
    assert "IMAGE must be an image file (No such file or directory), got" in refused(name, str(tmp_path / "none.png"))
    assert "IMAGE must be an image file (no image in a format that is read), got" in refused(
        name, str(tmp_path / "text.png")
    )
    assert "IMAGE must be an image file (" in refused(name, str(tmp_path))
    assert "--label 0: is not needed: this generator has no classes" in refused(name, photo, "--label", "0")
    assert "--steps must be 0 to 100,000, got -1" in refused(name, photo, "--steps", "-1")
    assert "--starts must be 1 to 64, got 0" in refused(name, photo, "--starts", "0")
    assert "--seed must be at least 0, got -3" in refused(name, photo, "--seed", "-3")
    assert "--background must be a color" in refused(name, photo, "--background", "no color")
    taken = refused(name, photo, "--steps", "0", "--out", str(tmp_path / "a file"))
    assert "--out must be a folder that can be written, got" in taken
    exported = ExportedModule(lambda latent: latent, "cpu", None)  # as of an ONNX file
    meta = load(run).meta
    monkeypatch.setattr("fastgan.generator.load", lambda *_: TrainedGenerator(exported, meta))
    assert "RUN must be a run or a .safetensors export" in refused(name, photo)
