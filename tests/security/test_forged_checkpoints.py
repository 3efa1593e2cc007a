"""Checkpoints with values that nobody trained: refused in one line that names the file and the key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from readers import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastgan
from fastgan import checkpoint
from fastgan.cli import train
from fastgan.errors import ArgumentError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forged") / "run"
    assert train.main([*TINY, "--out", str(path), "--keep", "1"]) == 0
    return path


def sign(path: Path, meta: dict[str, Any]) -> None:
    """Write `meta` with the hashes that belong to it and to the files."""
    meta.pop("sha256", None)
    for name in meta["files"]:
        content = (path / name).read_bytes()
        meta["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "checkpoint.json").write_text(json.dumps({**meta, "sha256": checkpoint._digest(meta)}))


def resume(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--resume` says, in one line."""
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--kimg", "0.032"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("images", value) for value in (-1, "many", None, 1.5, True)),
        *(("steps", value) for value in (-1, 2**40, [])),
        *(("ema_steps", value) for value in (-1, 2**63, "x")),
        *(("resolution", value) for value in (0, 7, "8", 2**20)),
        *(("world_size", value) for value in (0, -2, {}, 10**9)),
        *(("accumulation", value) for value in (0, "2")),
        *(("seed", value) for value in (-1, 2**60, "seed")),
        *(("variant", value) for value in (3, None, "a\nb", "x" * 10_000)),
        *(("optimizer", value) for value in (3, {})),
        *(("data", value) for value in (3, {}, {"fingerprint": 1}, {"fingerprint": "x", "seed": "y"})),
        *(("classes", value) for value in (3, "cat", [1], ["a\nb"], ["x" * 10_000])),
        *(("networks", value) for value in (3, {}, {"model": "unknown"}, {"model": "dcgan", "resolution": 9})),
        *(("networks.latent", value) for value in (0, -1, "4", 2**40, None)),
        *(("networks.num_classes", value) for value in (-1, 10**12, True)),
        *(("networks.norm_g", value) for value in ("layer", 1)),
        *(("implementations", value) for value in (3, {}, {"shipped": None, "machine": {}, "classes": {"x": "cpp"}})),
        *(("implementations.classes", value) for value in (None, {"x": [3]}, {"x\n": ["cpp"]}, {"x": ["y" * 300]})),
        *(("implementations.machine", value) for value in (["cpu"], {"device": "x" * 300}, {"device\n": None})),
        ("implementations.shipped", 1),
        *(("runaway", value) for value in (3, {}, {"recent": [{"loss_d": "x"}], "images": 0, "leap": None})),
    ],
)
def test_a_forged_value_is_named(run: Path, capsys: pytest.CaptureFixture[str], key: str, value: object) -> None:
    (path,) = checkpoint.existing(run)
    good = (path / "checkpoint.json").read_bytes()
    meta = json.loads(good)
    *outer, last = key.split(".")
    (meta[outer[0]] if outer else meta)[last] = value
    try:
        sign(path, meta)
        if key == "runaway":
            line = resume(run, capsys)
        else:
            with pytest.raises(ArgumentError) as error:
                checkpoint.read(run, "--resume")
            line = str(error.value)
    finally:
        (path / "checkpoint.json").write_bytes(good)
    assert "checkpoint.json is damaged" in line and key.partition(".")[0] in line and "\n" not in line


REQUIRED = ("networks", "images", "steps", "ema_steps", "resolution", "world_size", "seed", "data")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_value_is_named(run: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    (path,) = checkpoint.existing(run)
    good = (path / "checkpoint.json").read_bytes()
    meta = json.loads(good)
    del meta[key]
    try:
        sign(path, meta)
        assert f"checkpoint.json has no {key}" in resume(run, capsys)
    finally:
        (path / "checkpoint.json").write_bytes(good)


def some(tensors: dict[str, Tensor], start: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(start) and tensors[name].is_floating_point())


def set_nan(tensors: dict[str, Tensor], start: str) -> None:
    tensors[some(tensors, start)].view(-1)[0] = torch.nan


CHANGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "NaN in the average": ("generator", lambda t: set_nan(t, ""), "is not finite"),
    "NaN in a weight": ("training", lambda t: set_nan(t, "discriminator:"), "is not finite"),
    "NaN in an optimizer": ("training", lambda t: set_nan(t, "optimizer_g:"), "is not finite"),
    "weight gone": ("training", lambda t: t.pop(some(t, "generator:")), "does not fit: weight"),
    "weight more": ("training", lambda t: t.update({"generator:more": torch.zeros(1)}), "does not fit: weight 'more'"),
    "weight reshaped": ("generator", lambda t: t.update({some(t, ""): torch.zeros(3)}), "has shape [3]"),
    "state of no weight": (
        "training",
        lambda t: t.update({"optimizer_d:x/step": torch.zeros(1)}),
        "is of no weight",
    ),
    "random state": ("training", lambda t: t.update({"random:rank0": torch.zeros(3)}), "random:rank0 is no state"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_not_those_of_the_networks(run: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    (path,) = checkpoint.existing(run)
    file, edit, words = CHANGES[change]
    good = {one.name: one.read_bytes() for one in path.iterdir()}
    tensors = load_file(path / f"{file}.safetensors")
    try:
        edit(tensors)
        save_file(tensors, path / f"{file}.safetensors")
        sign(path, json.loads(good["checkpoint.json"]))
        line = resume(run, capsys)
        assert f"{file}.safetensors" in line and words in line
        if file == "generator":
            with pytest.raises(ArgumentError, match=r"generator\.safetensors"):
                fastgan.load(run)
    finally:
        for name, content in good.items():
            (path / name).write_bytes(content)
