"""Reader of the progressive GANs that pytorch_GAN_zoo published on torch.hub.

A checkpoint is a dictionary: "netG", "netD" and "avgG" (the moving average) are state dictionaries, "config" is an
object of settings. The generator differs from `fastgan.models.pggan.Generator` in four points:

- a layer computes c (W x + b) with c = sqrt(2 / fan in): its bias is scaled too, ours is not;
- the gain in c is sqrt(2) in every layer; ours is sqrt(2) / 4 in the input layer and 1 in toRGB;
- alpha is the share of the lower resolution, ours is that of the higher;
- the widths are a list, which `Generator` takes as `fmaps_at`.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import models
from fastgan.errors import ArgumentError
from fastgan.utils.files import read_regular


class Settings:
    """Stands in for the class of the checkpoint's "config": takes its attributes, has no code."""


def read(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The generator of a checkpoint, in evaluation mode, and its metadata.

    Raises:
        ArgumentError: the file is not such a checkpoint, or its network has no equivalent here.
    """
    stored = _read_checkpoint(path)
    networks, state = convert(stored, str(path))
    try:
        generator = models.load_generator(networks, state)
    except ValueError as error:
        raise ArgumentError("FILE", str(path), f"must be a progressive generator ({str(error)[:150]})") from None
    meta = {"variant": "pggan", "networks": networks, "data": f"not recorded; imported from {path.name}"}
    if "avgG" not in stored:
        meta["weights"] = "last weights: the checkpoint has no moving average"
    return generator.eval().requires_grad_(False), meta


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary of a checkpoint. The only class that it may name is that of its settings (see `Settings`)."""
    try:
        content = read_regular(path)
        archive = (
            _own_archive(content) if zipfile.is_zipfile(io.BytesIO(content)) else content
        )  # before torch 1.6: none
        with torch.serialization.safe_globals([(Settings, "models.utils.config.BaseConfig")]):
            stored = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArgumentError("FILE", str(path), f"must be a readable file ({error.strerror})") from None
    except Exception as error:  # torch documents no exceptions for files of another kind
        lines = [line.strip() for line in str(error).splitlines() if "global" in line.lower()]
        reason = lines[0][:150] if lines else "torch.save did not write this file"
        raise ArgumentError("FILE", str(path), f"must be a checkpoint of pytorch_GAN_zoo; {reason}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("avgG", stored.get("netG")), dict):
        raise ArgumentError("FILE", str(path), "must be a checkpoint of pytorch_GAN_zoo, with avgG or netG in it")
    weights: dict[str, Any] = stored.get("avgG", stored.get("netG"))  # type: ignore[assignment]
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > len(content):  # one storage, used many times
        raise ArgumentError("FILE", str(path), "must hold all its weights: they have more numbers than the file")
    return stored


def _own_archive(content: bytes) -> bytes:
    """The members of a zip archive in one of our own: torch's reader sees nothing that Python's does not.

    Raises:
        ValueError: they are compressed, which torch.save never does, or overlap: they take more memory than the file.
    """
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as theirs, zipfile.ZipFile(made, "w") as ours:
        members = theirs.infolist()
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("a compressed archive")
        for member in members:
            ours.writestr(member.filename, theirs.read(member))
    return made.getvalue()


def convert(stored: dict[str, Any], file: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `models.build` and the generator's state dictionary, from the dictionary of a checkpoint.

    Args:
        file: name of the checkpoint, for messages.

    Raises:
        ArgumentError: the network has no equivalent here, or is no progressive generator.
    """
    settings = dict(getattr(stored.get("config"), "__dict__", {}))
    _require_supported(settings, file)
    source = _without_wrappers(stored["avgG"] if "avgG" in stored else stored["netG"])
    try:
        levels = sum(name.startswith("toRGBLayers.") and name.endswith(".weight") for name in source)
        sizes = [4 * 2**i for i in range(max(levels, 1))]
        networks = {
            "model": "pggan",
            "resolution": sizes[-1],
            "channels": source["toRGBLayers.0.weight"].shape[0],
            "latent": source["formatLayer.weight"].shape[1],
            "num_classes": 0,
            "fused_scale": True,
            "fmaps_at": {str(size): source[f"toRGBLayers.{i}.weight"].shape[1] for i, size in enumerate(sizes)},
        }
        state = _convert_layers(source, sizes, bool(settings.get("equalizedlR", True)))
    except (KeyError, AttributeError, IndexError) as error:
        raise ArgumentError("FILE", file, f"must be a progressive generator; it has no {error}") from None
    if source:
        raise ArgumentError("FILE", file, f"must be a progressive generator; it has an unknown {next(iter(source))}")
    lower_share = float(settings.get("alpha", 0.0)) if levels > 1 else 0.0
    state["alpha"] = torch.tensor(1.0 - lower_share)
    return networks, state


def _require_supported(settings: dict[str, Any], file: str) -> None:
    refused = {
        "attribKeysOrder": (bool(settings.get("attribKeysOrder")), "must be one without class attributes (AC-GAN)"),
        "leakyReluLeak": (settings.get("leakyReluLeak", 0.2) != 0.2, "must be 0.2"),
        "perChannelNormalization": (not settings.get("perChannelNormalization", True), "must be True"),
        "lossCriterion": (settings.get("lossCriterion", "WGANGP") != "WGANGP", "must be WGANGP; others end in tanh"),
    }
    for name, (wrong, problem) in refused.items():
        if wrong:
            raise ArgumentError(f"{file}: {name}", settings[name], problem)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without `module.` in names: older files have it before the network, newer ones inside each layer."""
    return {".".join(part for part in name.split(".") if part != "module"): value for name, value in state.items()}


def _convert_layers(source: dict[str, Tensor], sizes: list[int], equalized: bool) -> dict[str, Tensor]:
    """Our weights of the layers at `sizes`. What is converted is removed from `source`.

    Args:
        equalized: whether `source` was trained with scaled weights (equalized learning rate).
    """
    state: dict[str, Tensor] = {}

    def layer(theirs: str, ours: str, gain: float = math.sqrt(2.0)) -> None:
        """Theirs is c (W x + b), ours gain / sqrt(fan in) W x + b."""
        weight, bias = source.pop(f"{theirs}.weight").float(), source.pop(f"{theirs}.bias").float()
        fan_in = weight[0].numel()
        c = math.sqrt(2.0 / fan_in) if equalized else 1.0
        state[f"{ours}.weight"] = weight * (c * math.sqrt(fan_in) / gain)
        state[f"{ours}.bias"] = bias * c

    layer("formatLayer", "input", math.sqrt(2.0) / 4.0)
    layer("groupScale0.0", "conv")
    for i, size in enumerate(sizes):
        if size > 4:
            layer(f"scaleLayers.{i - 1}.0", f"blocks.{size}.conv1")
            layer(f"scaleLayers.{i - 1}.1", f"blocks.{size}.conv2")
        layer(f"toRGBLayers.{i}", f"to_rgb.{size}", 1.0)
    return state
