"""Write a trained generator for others' tools: `fastgan export RUN --format onnx`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastgan import __version__
from fastgan.cli.main import command, writing
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.generator import TrainedGenerator

TOLERANCE = 1e-4  # of a pixel in [-1, 1]: a fortieth of a step of 8-bit images


@dataclass(frozen=True)
class Export:
    """Write the averaged generator of a run as one file, with a model card beside it.

    The file is opened again and must give the generator's images before it gets its name.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Run directory, one checkpoint in it, or a .safetensors export."""
    format: Literal["safetensors", "torch-export", "onnx", "torchscript"] = "safetensors"
    """safetensors: weights for fastgan and Generator.from_pretrained; torch-export: torch.export.load, C++ and others;
    onnx: onnxruntime and others; torchscript: torch.jit.load."""
    out: str | None = None
    """File or folder to write; None: RUN/export/model.safetensors, .pt2, .onnx or .torchscript."""
    batch: int | None = None
    """The one number of images that the file makes in a call; None: any."""
    license: str | None = None
    """License of the weights, for the model card, as the Hugging Face hub calls it: apache-2.0, cc-by-nc-4.0 ..."""


class Different(RuntimeError):
    """An exported file does not give the generator's images."""


def _source(path: Path) -> tuple[TrainedGenerator, Path]:
    """The generator, and the folder of its run (or its own)."""
    from fastgan.export import formats
    from fastgan.generator import load

    file = formats.find(path)
    if file is not None and file.suffix != ".safetensors":
        raise ArgumentError("RUN", str(path), "must be a run, a checkpoint or a .safetensors export")
    folder = path if path.is_dir() else path.parent
    run = next((p for p in (folder, folder.parent, folder.parent.parent) if (p / "config.yaml").is_file()), folder)
    return load(path), run


def describe(trained: TrainedGenerator, run: Path, batch: int | None, license: str | None) -> dict[str, Any]:
    """What an exported file says of itself."""
    keys: tuple[str, ...] = ("variant", "images", "data", "license", "weights")
    known = {key: trained.meta[key] for key in keys if key in trained.meta}
    if not isinstance(known.get("data"), str):  # of a checkpoint it is where its pipeline stood
        known.pop("data", None)
    meta: dict[str, Any] = dict(known)
    meta |= {"version": __version__, "networks": trained.meta["networks"], "batch": batch}
    alpha = trained.module.state_dict().get("alpha")
    if alpha is not None and alpha < 1:
        meta["alpha"] = round(alpha.item(), 6)
    if (run / "config.yaml").is_file():
        from fastgan.config.files import read_yaml
        from fastgan.export.model_card import data_name

        stored = read_yaml(run / "config.yaml", "RUN")
        # As `merge` says it; what else may be wrong with the run's settings is nothing to its weights.
        sections = {name: stored.get(name, {}) for name in ("data", "optimizer")}
        for name, section in sections.items():
            if not isinstance(section, dict):
                where = f"{run / 'config.yaml'}: {name}"
                raise ArgumentError(where, section, "must be a mapping of keys to values")
        meta["data"] = data_name(str(sections["data"].get("data", "")))
        if sections["optimizer"].get("ema_decay") == 0:
            meta["weights"] = "the last ones: the run kept no average (ema_decay 0)"
    if license is not None:
        meta["license"] = license
    return meta


def _check(file: Path, trained: TrainedGenerator, meta: dict[str, Any]) -> float:
    """Largest difference of a pixel between the file's images and the generator's, over several batches.

    Raises:
        Different: it is more than rounding.
    """
    import torch

    from fastgan.export import formats

    opened, stored = formats.reopen(file)
    if json.loads(json.dumps(meta)) != stored:
        raise Different("the exported file says something else of itself than was written")
    largest = 0.0
    for batch in (1, 2, 5):
        inputs = formats.inputs_of(meta, batch, seed=batch)
        with torch.no_grad():
            expected, got = trained.module(*inputs), opened(*inputs)
        unit = max(1.0, expected.abs().max().item())  # pggan's images are not bounded
        difference = (got - expected).abs().max().item() / unit if got.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:
            raise Different(f"at batch {batch} the exported file differs by {difference:.2g}; it may by {TOLERANCE:g}")
        largest = max(largest, difference)
    return largest


def _same(file: Path, meta: dict[str, Any]) -> bool:
    """Whether a file that lies beside is an export of the same generator, which one card can describe."""
    from fastgan.export import formats

    if file.name.startswith("."):
        return False
    try:
        stored = formats.read_meta(file)
    except (ArgumentError, ModuleNotFoundError):
        return False
    return all(stored.get(key) == meta.get(key) for key in ("variant", "images", "networks", "alpha"))


def target(out: str | None, run: Path, suffix: str) -> Path:
    """The file to write: one that is not there, or an export that may be replaced, and so may config.json beside it.

    Raises:
        ArgumentError: it is of another kind, or would replace what fastgan did not write.
    """
    from fastgan.export import formats

    path = Path(out) if out is not None else run / "export"
    if path.is_dir() or path.suffix == "" or str(out).endswith(("/", os.sep)):
        path = path / f"model{suffix}"
    if path.suffix != suffix:
        may_be = f"must be a folder (with / at its end if a new one has a dot), or a file that ends in {suffix}"
        raise ArgumentError("--out", out, may_be)
    if path.exists() and out is not None:
        try:
            formats.read_meta(path)
        except ArgumentError:
            raise ArgumentError("--out", out, "it exists and is no export of fastgan; it may be another name") from None
    config = path.with_name("config.json")
    if path.name == "model.safetensors" and not formats.is_config(config):
        may_be = f"{config} is not fastgan's and would be replaced; it may be another folder, or a file of another name"
        raise ArgumentError("--out", str(path) if out is None else out, may_be)
    return path


def write(trained: TrainedGenerator, meta: dict[str, Any], format: str, path: Path, run: Path) -> float:
    """Write `path`, its card and, for weights named model.safetensors, config.json; all of them whole or not at all.

    Returns:
        The largest difference between the file's images and the generator's.

    Raises:
        Different: the file does not give the generator's images. OSError: it cannot be written.
    """
    from fastgan.export import formats, model_card

    made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own ending: the check opens it as what it will be.
    partial = path.with_name(f".part-{path.name}")
    parts = [partial]
    try:
        partial.write_bytes(formats.FORMATS[format].write(trained.module, meta, meta["batch"]))
        difference = _check(partial, trained, meta)
        texts = {}
        if path.name == "model.safetensors":
            networks = meta["networks"]
            config = {**networks, "norm": networks.get("norm_g", "batch")}
            texts["config.json"] = json.dumps(config, indent=1, sort_keys=True) + "\n"
        suffixes = [it.suffix for it in formats.FORMATS.values()]
        beside = [p.name for p in path.parent.iterdir() if p.suffix in suffixes and _same(p, meta)]
        if model_card.replaceable(path.with_name("README.md")):
            files = sorted({path.name, *beside}, key=lambda name: (suffixes.index(Path(name).suffix), name))
            stored = trained.meta.get("data")  # of a checkpoint it has the data's fingerprint
            fingerprint = stored.get("fingerprint") if isinstance(stored, dict) else None
            rows = model_card.evaluations(run, meta.get("images"), fingerprint)
            texts["README.md"] = model_card.text(meta, files, rows)
        for name, content in texts.items():
            parts.append(path.with_name(f".part-{name}"))
            parts[-1].write_text(content, encoding="utf-8")
        for part in parts:
            os.replace(part, part.with_name(part.name.removeprefix(".part-")))
        return difference
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
        raise


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(Export, args=argv, prog="fastgan export")
    if asked.batch is not None and asked.batch < 1:
        raise ArgumentError("--batch", asked.batch, "must be at least 1")
    if asked.license is not None and not asked.license.isprintable():
        raise ArgumentError("--license", asked.license, "must be a name in one line")
    from fastgan.export import formats

    path = Path(asked.run)
    trained, run = _source(path)
    if asked.format == "safetensors" and asked.batch is not None:
        raise ArgumentError("--batch", asked.batch, "it may be left out: weights fit every batch")
    path_out = target(asked.out, run, formats.FORMATS[asked.format].suffix)
    if path_out.exists() and path_out.samefile(path):
        raise ArgumentError("--out", str(path_out), "must be another file than the one that is read")
    meta = describe(trained, run, asked.batch, asked.license)
    return finish(trained, meta, asked.format, path_out, run)


def finish(trained: TrainedGenerator, meta: dict[str, Any], format: str, path: Path, run: Path) -> int:
    """Write the file and say so; the exit code.

    Raises:
        ArgumentError: it cannot be written.
    """
    try:
        with writing(path):
            difference = write(trained, meta, format, path, run)
    except Different as error:
        print(f"fastgan: {error}; nothing was written", file=sys.stderr, flush=True)
        return 1
    size = path.stat().st_size / 1e6
    print(f"{trained}, {format}, {size:.1f} MB, differs by {difference:.1g} at most: {path}")
    if not meta.get("license"):
        print("the model card states no license; --license NAME adds one")
    return 0
