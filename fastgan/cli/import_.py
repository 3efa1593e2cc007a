"""Read others' checkpoints: `fastgan import FILE`, the progressive GANs that pytorch_GAN_zoo published on torch.hub.

Such a file is a dictionary: "netG", "netD" and "avgG" (the average) are state dictionaries, "config" is an object of
settings. The generator there is ours but for this:

- a layer computes c (W x + b) with c = sqrt(2 / fan in): its bias is scaled too, and ours is not;
- c has the same gain in every layer, where our input has sqrt(2) / 4 and our toRGB 1;
- alpha is the share of the old resolution, ours that of the new;
- the widths are a list, which `Generator` takes as `fmaps_at`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastgan.cli.main import command
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from fastgan.generator import TrainedGenerator


class Settings:
    """What the checkpoint's "config" object becomes: its attributes, and no code of its own."""


@dataclass(frozen=True)
class Import:
    """Read the generator of a progressive GAN that pytorch_GAN_zoo published.

    The discriminator is left behind: the result is to be sampled, explored and exported.
    """

    file: Annotated[str, tyro.conf.Positional]
    """Checkpoint, as torch.hub downloads it (celebaHQ, DTD, celebaCropped ... .pth)."""
    out: str
    """Folder or .safetensors file to write, as fastgan export does."""
    license: str | None = None
    """License of the weights, for the model card, as the Hugging Face hub calls it."""


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint's dictionary; of classes it may name, only that of its settings is known, and stands for itself.

    Raises:
        ArgumentError: it cannot be read, or names another class or function.
    """
    import torch

    try:
        with torch.serialization.safe_globals([(Settings, "models.utils.config.BaseConfig")]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArgumentError("FILE", str(path), f"must be a file that can be read ({error.strerror})") from None
    except Exception as error:  # what torch raises for a file of another kind is not documented
        words = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        reason = words.strip()[:150] or "no file that torch.save wrote"
        raise ArgumentError("FILE", str(path), f"must be a checkpoint of pytorch_GAN_zoo; {reason}") from None
    if not isinstance(found, dict) or not isinstance(found.get("avgG", found.get("netG")), dict):
        raise ArgumentError("FILE", str(path), "must be a checkpoint of pytorch_GAN_zoo, with avgG or netG in it")
    return found


def _layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state under one kind of name: files of some years have `module.` before the network or inside a layer."""
    return {".".join(part for part in name.split(".") if part != "module"): value for name, value in state.items()}


def convert(stored: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values for `models.build` and the generator's state, of the dictionary in a checkpoint.

    Raises:
        ArgumentError: it is a network that ours cannot stand for, or no progressive generator.
    """
    settings = dict(getattr(stored.get("config"), "__dict__", {}))
    refused = {
        "attribKeysOrder": (bool(settings.get("attribKeysOrder")), "must be one without class attributes (AC-GAN)"),
        "leakyReluLeak": (settings.get("leakyReluLeak", 0.2) != 0.2, "must be 0.2"),
        "perChannelNormalization": (not settings.get("perChannelNormalization", True), "must be True"),
        "lossCriterion": (settings.get("lossCriterion", "WGANGP") != "WGANGP", "must be WGANGP; others end in tanh"),
    }
    for name, (wrong, may_be) in refused.items():
        if wrong:
            raise ArgumentError(f"{where}: {name}", settings[name], may_be)
    source = _layers(stored["avgG"] if "avgG" in stored else stored["netG"])
    equalized = bool(settings.get("equalizedlR", True))
    try:
        levels = sum(name.startswith("toRGBLayers.") and name.endswith(".weight") for name in source)
        channels, latent = source["toRGBLayers.0.weight"].shape[0], source["formatLayer.weight"].shape[1]
        sizes = [4 * 2**i for i in range(levels)]
        fmaps_at = {str(size): source[f"toRGBLayers.{i}.weight"].shape[1] for i, size in enumerate(sizes)}
        state: dict[str, Tensor] = {}

        def layer(theirs: str, ours: str, gain: float = math.sqrt(2.0)) -> None:
            """Theirs computes c (W x + b), ours gain / sqrt(fan in) W x + b."""
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
    except (KeyError, AttributeError, IndexError) as error:
        raise ArgumentError("FILE", where, f"must be a progressive generator; it has no {error}") from None
    if source:
        raise ArgumentError("FILE", where, f"must be a progressive generator; what is {next(iter(source))}?")
    import torch

    old_share = float(settings.get("alpha", 0.0)) if levels > 1 else 0.0
    state["alpha"] = torch.tensor(1.0 - old_share)
    networks = {
        "model": "pggan",
        "resolution": sizes[-1],
        "channels": channels,
        "latent": latent,
        "num_classes": 0,
        "fused_scale": True,
        "fmaps_at": fmaps_at,
    }
    return networks, state


def load(path: Path) -> TrainedGenerator:
    """The generator of a checkpoint of pytorch_GAN_zoo.

    Raises:
        ArgumentError: it is none, or one that ours cannot stand for.
    """
    from fastgan import models
    from fastgan.generator import TrainedGenerator

    stored = _read(path)
    networks, state = convert(stored, str(path))
    generator = models.MODELS["pggan"].Generator(
        **{k: v for k, v in networks.items() if k not in ("model", "num_classes")}
    )
    try:
        generator.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArgumentError("FILE", str(path), f"must be a progressive generator ({reason[:150]})") from None
    meta = {"variant": "pggan", "networks": networks, "data": f"not recorded; imported from {path.name}"}
    if "avgG" not in stored:
        meta["weights"] = "the last ones: the checkpoint has no average"
    return TrainedGenerator(generator.eval().requires_grad_(False), meta)


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(Import, args=argv, prog="fastgan import")
    from fastgan.cli import export

    path = Path(asked.file)
    target = export.target(asked.out, path.parent, ".safetensors")
    trained = load(path)
    meta = export.describe(trained, target.parent, None, asked.license)
    if "weights" in meta:
        print("no average of the weights in this checkpoint: the last ones are taken", file=sys.stderr)
    return export.finish(trained, meta, "safetensors", target, target.parent)
