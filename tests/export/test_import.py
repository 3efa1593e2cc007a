"""pytorch_GAN_zoo's progressive GANs: a checkpoint of its layout, and its forward written down independently."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from fastgan.cli import export, import_
from fastgan.errors import ArgumentError
from fastgan.export import pytorch_gan_zoo

WIDTHS, LATENT, CHANNELS = [12, 12, 10, 6], 9, 3


def zoo_state(widths: list[int], seed: int, inner: str = "module.") -> dict[str, Tensor]:
    """Weights under the names of that repository's generator."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"formatLayer": (16 * widths[0], LATENT), "groupScale0.0": (widths[0], widths[0], 3, 3)}
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        shapes[f"scaleLayers.{i}.0"] = (after, before, 3, 3)
        shapes[f"scaleLayers.{i}.1"] = (after, after, 3, 3)
    for i, width in enumerate(widths):
        shapes[f"toRGBLayers.{i}"] = (CHANNELS, width, 1, 1)
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.{inner}weight"] = torch.randn(shape, generator=random)
        state[f"{name}.{inner}bias"] = torch.randn(shape[0], generator=random)
    return state


def zoo_forward(state: dict[str, Tensor], z: Tensor, alpha: float, equalized: bool = True) -> Tensor:
    """Independent implementation of its generator; `alpha` is the share of the lower resolution."""

    def apply(name: str, x: Tensor) -> Tensor:
        w, b = (state[f"{name}.module.{part}"] for part in ("weight", "bias"))
        y = F.linear(x, w, b) if w.ndim == 2 else F.conv2d(x, w, b, padding=w.shape[-1] // 2)
        return y * math.sqrt(2.0 / (w.numel() / w.shape[0])) if equalized else y

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()

    def step(name: str, x: Tensor) -> Tensor:
        return norm(F.leaky_relu(apply(name, x), 0.2))

    def double(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = norm(F.leaky_relu(apply("formatLayer", norm(z)), 0.2).reshape(len(z), -1, 4, 4))
    x = below = step("groupScale0.0", x)
    levels = sum(name.startswith("toRGB") for name in state) // 2
    for i in range(levels - 1):
        below, x = x, step(f"scaleLayers.{i}.1", step(f"scaleLayers.{i}.0", double(x)))
    image = apply(f"toRGBLayers.{levels - 1}", x)
    if alpha > 0 and levels > 1:
        image = alpha * double(apply(f"toRGBLayers.{levels - 2}", below)) + (1 - alpha) * image
    return image


def save(path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool = False, **parts: Any) -> Path:
    """A checkpoint as that repository saves it: its settings are an object of a class that does not exist here."""
    settings = {
        "leakyReluLeak": 0.2,
        "perChannelNormalization": True,
        "equalizedlR": True,
        "lossCriterion": "WGANGP",
        "alpha": 0.0,
        "depthOtherScales": WIDTHS[1:],
        "attribKeysOrder": None,
        **parts.pop("settings", {}),
    }
    with monkeypatch.context() as there:
        for name in ("models", "models.utils", "models.utils.config"):
            there.setitem(sys.modules, name, types.ModuleType(name))
        cls = type("BaseConfig", (), {"__module__": "models.utils.config"})
        sys.modules["models.utils.config"].BaseConfig = cls  # type: ignore[attr-defined]
        config = cls()
        config.__dict__.update(settings)
        stored = {"config": config, "netG": zoo_state(WIDTHS, 1), "netD": {"x": torch.zeros(1)}, **parts}
        stored = {key: value for key, value in stored.items() if value is not None}
        torch.save(stored, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("equalized", [True, False])
@pytest.mark.parametrize("widths", [WIDTHS, WIDTHS[:2], WIDTHS[:1]], ids=["32px", "8px", "4px"])
def test_images_equal_the_original(
    alpha: float, equalized: bool, widths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = zoo_state(widths, 2)
    file = save(
        tmp_path / "x.pth",
        monkeypatch,
        avgG=state,
        settings={"alpha": alpha, "equalizedlR": equalized},
        legacy=equalized,
    )
    assert import_.main([str(file), "--out", str(tmp_path / "out"), "--license", "other"]) == 0
    trained = fastgan.load(tmp_path / "out")
    z = torch.randn(5, LATENT, generator=torch.Generator().manual_seed(0))
    expected = zoo_forward(state, z, alpha, equalized)
    assert expected.shape[-1] == 4 * 2 ** (len(widths) - 1) and expected.std() > 0.1
    # Images are not bounded: rounding is relative to the largest value, not to each.
    assert (trained.module(z) - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


def test_an_import_is_sampled_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="extra export: pip install 'fastgan[export]'")
    file = save(tmp_path / "celeba.pth", monkeypatch, avgG=zoo_state(WIDTHS, 2))
    out = tmp_path / "celeba.safetensors"
    assert import_.main([str(file), "--out", str(out)]) == 0
    assert "imported from celeba.pth" in (tmp_path / "README.md").read_text()
    assert export.main([str(out), "--format", "onnx", "--out", str(tmp_path)]) == 0
    images = [fastgan.load(path).sample(3, seed=1) for path in (out, tmp_path / "model.onnx")]
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("inner", ["", "module."])
def test_names_in_older_files_and_a_missing_average(
    inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = zoo_state(WIDTHS, 4)
    renamed = {f"module.{name.replace('module.', inner)}": value for name, value in state.items()}
    file = save(tmp_path / "x.pth", monkeypatch, netG=renamed)
    assert import_.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert "no moving average" in capsys.readouterr().err
    z = torch.randn(2, LATENT)
    images = fastgan.load(tmp_path / "out").module(z)
    torch.testing.assert_close(images, zoo_forward(state, z, 0.0), atol=1e-4, rtol=1e-4)


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cut = zoo_state(WIDTHS, 1)
    del cut["scaleLayers.0.0.module.bias"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"settings": {"attribKeysOrder": {"hair": 1}}}, "attribKeysOrder"),
        ({"settings": {"leakyReluLeak": 0.1}}, "leakyReluLeak"),
        ({"settings": {"perChannelNormalization": False}}, "perChannelNormalization"),
        ({"settings": {"lossCriterion": "DCGAN"}}, "lossCriterion"),
        ({"avgG": cut}, "scaleLayers.0.0.bias"),
        ({"avgG": {**zoo_state(WIDTHS, 1), "mapping.weight": torch.ones(1)}}, "mapping.weight"),
        ({"netG": None}, "avgG or netG"),
        ({"avgG": torch.ones(1)}, "avgG or netG"),
    ]
    for number, (parts, word) in enumerate(cases):
        file = save(tmp_path / f"{number}.pth", monkeypatch, **parts)
        assert import_.main([str(file), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and word in error, error
    (tmp_path / "text.pth").write_text("no checkpoint")
    for file, word in ((tmp_path / "text.pth", "FILE"), (tmp_path / "missing.pth", "missing.pth")):
        assert import_.main([str(file), "--out", str(tmp_path / "out")]) == 2
        assert word in capsys.readouterr().err
    assert import_.main([str(tmp_path / "0.pth"), "--out", str(tmp_path / "x.onnx")]) == 2
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def recompressed(path: Path, method: int, copies: int = 0) -> None:
    """Pack the members of a checkpoint again; `copies`: list the largest as many times more, each without bytes."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        for number in range(copies):
            again = copy.copy(largest)
            again.filename = f"{largest.filename}{number}"
            archive.filelist.append(again)


def test_a_small_checkpoint_asks_for_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by compression, members that share their bytes, strides of 0, nor the widths of layers that are not there."""
    good = zoo_state(WIDTHS, 2)
    big = torch.zeros(1).expand(2**20, 2**10)
    wide = {**good, **{f"toRGBLayers.{i}.module.weight": torch.zeros(3, 2**16, 1, 1) for i in range(len(WIDTHS))}}
    cases: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, str]] = {
        "deflated": (
            {"more": torch.zeros(2**16)},
            lambda path: recompressed(path, zipfile.ZIP_DEFLATED),
            "pytorch_GAN",
        ),
        "overlap": ({"more": torch.ones(2**16)}, lambda path: recompressed(path, zipfile.ZIP_STORED, 9), "pytorch_GAN"),
        "stride": ({"avgG": {**good, "formatLayer.module.weight": big}}, None, "must hold all its weights"),
        "shared": ({"avgG": {f"{i}": good["formatLayer.module.weight"] for i in range(999)}}, None, "must hold all"),
        "widths": ({"avgG": wide}, None, "its network needs"),
        "nothing": ({"avgG": {}}, None, "toRGBLayers"),
    }
    for name, (parts, change, words) in cases.items():
        file = save(tmp_path / f"{name}.pth", monkeypatch, **{"avgG": good, **parts})
        if change is not None:
            change(file)
        with pytest.raises(ArgumentError, match=words):
            pytorch_gan_zoo.read(file)
    stored = save(tmp_path / "stored.pth", monkeypatch, avgG=good)
    recompressed(stored, zipfile.ZIP_STORED)
    assert pytorch_gan_zoo.read(stored)[1]["networks"]["resolution"] == 32
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pth")
        with pytest.raises(ArgumentError, match="not a regular file"):
            pytorch_gan_zoo.read(tmp_path / "pipe.pth")


def test_a_config_of_another_tool_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    file = save(tmp_path / "x.pth", monkeypatch)
    assert import_.main([str(file), "--out", str(tmp_path / "out")]) == 2
    assert "config.json was not written by fastgan" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "executed"
    file = save(tmp_path / "x.pth", monkeypatch, tmp=Bomb(trace))
    with pytest.raises(ArgumentError, match="FILE"):
        pytorch_gan_zoo.read(file)
    plain = tmp_path / "y.pth"
    plain.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ArgumentError, match="FILE"):
        pytorch_gan_zoo.read(plain)
    assert not trace.exists()
