"""Runs with the checkpoint of an untrained generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fastgan import checkpoint, models

SIZES = {"channels": 2, "latent": 6, "width": 8, "max_width": 16, "fmap_base": 2048, "fmap_max": 32, "num_classes": 0}
# pggan at its first stage, while fading in, and fully grown: 32 px uses the fused change of scale.
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp", "resolution": 8},
    "dcgan": {"model": "dcgan", "resolution": 8, "norm_g": "batch"},
    "dcgan-no-norm": {"model": "dcgan", "resolution": 8, "norm_g": "none"},
    "sagan": {"model": "sagan", "resolution": 8},
    "sagan-classes": {"model": "sagan", "resolution": 8, "num_classes": 3},
    "pggan-4": {"model": "pggan", "resolution": 4},
    "pggan-fading": {"model": "pggan", "resolution": 16, "alpha": 0.4},
    "pggan": {"model": "pggan", "resolution": 32},
    "r3gan": {"model": "r3gan", "resolution": 16},
    "dcgan-gray": {"model": "dcgan", "resolution": 8, "channels": 1},
    "sagan-classes-gray": {"model": "sagan", "resolution": 8, "num_classes": 3, "channels": 1},
}


def build(case: str) -> tuple[nn.Module, dict[str, Any]]:
    """A generator whose statistics and gains differ from their initial values, and its arguments of `models.build`."""
    networks = {**SIZES, **CASES[case]}
    alpha = networks.pop("alpha", 1.0)
    torch.manual_seed(3)
    generator, _ = models.build(**networks)
    with torch.no_grad():
        for name, tensor in generator.state_dict().items():
            if name.endswith(("running_mean", "gamma", "bias", "affine.weight")):
                tensor.normal_(0.0, 0.3)
    if networks["model"] == "pggan":
        generator.set_alpha(alpha)  # type: ignore[operator]
    return generator.eval().requires_grad_(False), networks


def make_run(path: Path, case: str = "dcgan", data: str = "folder:/home/me/photos", ema: float = 0.9) -> Path:
    generator, networks = build(case)
    pipeline = {"fingerprint": "own"}  # state of the data pipeline
    meta = {"version": "0", "variant": networks["model"], "networks": networks, "images": 12_000, "data": pipeline}
    checkpoint.save(path, meta, dict(generator.state_dict()), {"random": {"rank0": torch.zeros(1)}}, 1)
    config = {"schema": 1, "variant": "dcgan", "data": {"data": data}, "optimizer": {"ema_decay": ema}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path
