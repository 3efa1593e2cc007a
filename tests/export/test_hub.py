"""Generators on torch.hub and the Hugging Face hub, from local folders: nothing here needs a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CASES, build, make_run

import fastgan
from fastgan import models
from fastgan.cli import export

ROOT = Path(fastgan.__file__).parents[1]
hub = pytest.importorskip("huggingface_hub", reason="extra export: pip install 'fastgan[export]'")


@pytest.mark.parametrize("case", CASES)
def test_save_pretrained_and_from_pretrained(case: str, tmp_path: Path) -> None:
    generator, networks = build(case)
    assert isinstance(generator, hub.PyTorchModelHubMixin)
    generator.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == networks["model"]
    cls: Any = models.MODELS[networks["model"]].Generator
    again = cls.from_pretrained(tmp_path)
    classes = networks["num_classes"]
    inputs = (torch.randn(3, networks["latent"]), torch.arange(3) % classes if classes else None)
    loaded = fastgan.load(tmp_path)
    with torch.no_grad():  # where autograd watches, small convolutions take another kernel
        assert torch.equal(again(*inputs), generator(*inputs)) and not again.training
        assert torch.equal(loaded.module(*inputs), generator(*inputs))
    assert loaded.sample(2).shape == (2, networks["channels"], networks["resolution"], networks["resolution"])


def test_from_pretrained_reads_an_export_and_requires_all_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = make_run(tmp_path / "run", "pggan-fading")
    assert export.main([str(run)]) == 0
    again = models.pggan.Generator.from_pretrained(run / "export")
    latent = torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(again(latent), fastgan.load(run).module(latent))
    file = run / "export" / "model.safetensors"
    weights = load_file(file)
    del weights["conv.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"conv\.bias"):
        models.pggan.Generator.from_pretrained(run / "export")


def test_from_pretrained_compares_shapes_before_memory(tmp_path: Path) -> None:
    """Terabytes that config.json asks for, other channels than an image has, and pipes in place of files."""
    run = make_run(tmp_path / "run", "dcgan")
    assert export.main([str(run)]) == 0
    folder = run / "export"
    good = json.loads((folder / "config.json").read_text())
    cls: Any = models.dcgan.Generator
    for key, value, words in (
        ("latent", 2**20, "its network needs"),
        ("latent", 2**40, "latent must be"),
        ("max_width", 2**20, "its network needs"),
        ("channels", 128, "channels must be a whole number from 1 to 4"),
        ("resolution", 2**20, "resolution must be"),
    ):
        width = {"width": value} if key == "max_width" else {}
        (folder / "config.json").write_text(json.dumps({**good, **width, key: value}))
        with pytest.raises(ValueError, match=words) as error:
            cls.from_pretrained(folder)
        assert len(str(error.value).splitlines()) == 1
    (folder / "config.json").write_text(json.dumps(good))
    assert cls.from_pretrained(folder, strict=False).latent == 6
    if hasattr(os, "mkfifo"):
        for name in ("model.safetensors", "config.json"):
            (folder / name).unlink()
            os.mkfifo(folder / name)
            with pytest.raises(OSError, match="not a regular file"):
                cls.from_pretrained(folder)


def test_a_generator_is_loaded_without_its_discriminator() -> None:
    """Widths that only the discriminator has are not compared with any weights."""
    generator, networks = build("pggan")
    widths = {str(size): generator.to_rgb[str(size)].weight.shape[1] for size in (4, 8, 16, 32)}
    hostile = {**networks, "fmaps_at": widths, "fmap_base": 2**20, "fmap_max": 2**20}
    loaded = models.load_generator(hostile, dict(generator.state_dict()))
    with torch.no_grad():
        assert torch.equal(loaded(torch.ones(1, 6)), generator(torch.ones(1, 6)))


def test_push_to_hub_sends_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    def upload(_: Any, *, folder_path: Path, **options: Any) -> str:
        sent.update(options, files={p.name for p in Path(folder_path).iterdir()})
        return "done"

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, **__: type("Url", (), {"repo_id": "me/digits"})())
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    generator, _ = build("mlp")
    generator.push_to_hub("me/digits")  # type: ignore[operator]
    assert sent["repo_id"] == "me/digits" and {"config.json", "model.safetensors"} <= sent["files"]


def test_models_work_without_huggingface_hub() -> None:
    code = """
import sys
sys.modules["huggingface_hub"] = None
from fastgan import models
import torch
generator, _ = models.build("mlp", resolution=8, channels=1, latent=4, width=8)
assert generator(torch.zeros(1, 4)).shape == (1, 1, 8, 8)
try:
    generator.save_pretrained("x")
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "fastgan[export]" in done.stdout


def test_torch_hub(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sagan-classes")
    expected = fastgan.load(run)
    trained = torch.hub.load(str(ROOT), "trained", source="local", path=str(run))
    assert torch.equal(trained.sample(3, seed=1), expected.sample(3, seed=1))
    generator = torch.hub.load(str(ROOT), "generator", source="local", path=str(run))
    inputs = torch.randn(2, 6), torch.tensor([0, 2])
    assert torch.equal(generator(*inputs), expected.module(*inputs))
