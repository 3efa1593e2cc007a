"""Writing an export: the file, checked against the generator it came from, with its model card and config.json."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgan import __version__
from fastgan.config.files import read_yaml
from fastgan.errors import ArgumentError
from fastgan.export import formats, model_card
from fastgan.ops.qualification.drawing import drawing
from fastgan.utils.files import AtomicFile
from fastgan.utils.text import first_line

if TYPE_CHECKING:
    from fastgan.generator import TrainedGenerator

TOLERANCE = 1e-4  # for pixels in [-1, 1]: 1/78 of a step of 8-bit images


class ExportMismatch(RuntimeError):
    """An exported file does not give the generator's images."""


def describe(trained: TrainedGenerator, run: Path, batch: int | None, license: str | None) -> dict[str, Any]:
    """The metadata stored in an exported file.

    Args:
        run: folder of the run; its config.yaml names the data and the averaging, if it is there.
        batch: fixed batch size of the file, or None.
        license: license of the weights; None keeps the one that `trained` already has.

    Raises:
        ArgumentError: a section of config.yaml is not a mapping.
    """
    keys: tuple[str, ...] = ("variant", "images", "data", "license", "weights")
    meta: dict[str, Any] = {key: trained.meta[key] for key in keys if key in trained.meta}
    if not isinstance(meta.get("data"), str):  # in a checkpoint, "data" is the state of the data pipeline
        meta.pop("data", None)
    meta |= {"version": __version__, "networks": trained.meta["networks"], "batch": batch}
    alpha = trained.module.state_dict().get("alpha")
    if alpha is not None and alpha < 1:
        meta["alpha"] = round(alpha.item(), 6)
    config = run / "config.yaml"
    if config.is_file():
        stored = read_yaml(config, "RUN")
        # Only these two sections are read: errors in other settings do not affect the weights.
        sections = {name: stored.get(name, {}) for name in ("data", "optimizer")}
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise ArgumentError(f"{config}: {name}", section, "must be a mapping of keys to values")
        meta["data"] = model_card.data_name(str(sections["data"].get("data", "")))
        if sections["optimizer"].get("ema_decay") == 0:
            meta["weights"] = "last weights: the run kept no moving average (ema_decay 0)"
    if license is not None:
        meta["license"] = license
    return meta


def largest_difference(content: bytes, format: str, trained: TrainedGenerator, meta: dict[str, Any]) -> float:
    """Largest difference of a pixel between the images of an exported file and of the generator, at batches 1, 2, 5.

    Args:
        content: the file, just written by this process.

    Raises:
        ExportMismatch: the file cannot be opened, differs by more than rounding, or has other metadata.
    """
    exported = formats.FORMATS[format]
    try:
        opened, stored = exported.open(content, "cpu"), exported.meta(content)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each library has its own
        raise ExportMismatch(f"the exported file cannot be opened ({first_line(error)})") from None
    if json.loads(json.dumps(meta)) != stored:
        raise ExportMismatch("the metadata in the exported file are not those that were written")
    largest = 0.0
    for batch in (1, 2, 5):
        inputs = formats.example_inputs(meta, batch, seed=batch)
        with torch.no_grad(), drawing(inputs[0].device):
            expected, got = trained.module(*inputs), opened(*inputs)
        scale = max(1.0, expected.abs().max().item())  # pggan's images are not bounded
        difference = (got - expected).abs().max().item() / scale if got.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:
            raise ExportMismatch(
                f"the images of the exported file differ by {difference:.2g} at batch {batch}; at most {TOLERANCE:g} "
                "is allowed"
            )
        largest = max(largest, difference)
    return largest


def output_path(out: str | None, run: Path, suffix: str) -> Path:
    """The file to write: a new one, or an earlier export that is replaced.

    Args:
        out: file or folder; None is the folder RUN/export.
        suffix: suffix of the format.

    Raises:
        ArgumentError: the suffix is wrong, or a file that fastgan did not write would be replaced.
    """
    path = Path(out) if out is not None else run / "export"
    if path.is_dir() or path.suffix == "" or str(out).endswith(("/", os.sep)):
        path = path / f"model{suffix}"
    if path.suffix != suffix:
        problem = f"must be a file that ends in {suffix}, or a folder (with / at its end if a new one has a dot)"
        raise ArgumentError("--out", out, problem)
    if path.exists() and out is not None:
        try:
            formats.read_meta(path)
        except ArgumentError:
            raise ArgumentError("--out", out, "the file exists and is no export of fastgan; use another name") from None
    config = path.with_name("config.json")
    if path.name == "model.safetensors" and not formats.may_replace_config(config):
        problem = f"{config} was not written by fastgan and would be replaced; use another folder or file name"
        raise ArgumentError("--out", str(path) if out is None else out, problem)
    return path


def write_export(trained: TrainedGenerator, meta: dict[str, Any], format: str, path: Path, run: Path) -> float:
    """Write an export, its model card and, for model.safetensors, config.json: all of them or none.

    Returns:
        The largest difference between the file's images and the generator's.

    Raises:
        ExportMismatch: the file does not give the generator's images.
        OSError: a file cannot be written.
    """
    content = formats.FORMATS[format].write(trained.module, meta, meta["batch"])
    difference = largest_difference(content, format, trained, meta)
    files = {}
    if path.name == "model.safetensors":
        networks = meta["networks"]
        config = {**networks, "norm": networks.get("norm_g", "batch")}
        files[path.with_name("config.json")] = (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()
    card = path.with_name("README.md")
    if model_card.may_replace(card):
        files[card] = _render_card(trained, meta, path, run).encode()
    _write_together({**files, path: content})
    return difference


def _render_card(trained: TrainedGenerator, meta: dict[str, Any], path: Path, run: Path) -> str:
    """The card of `path` and of the exports of the same generator beside it."""
    suffixes = [exported.suffix for exported in formats.FORMATS.values()]
    candidates = (file for file in path.parent.glob("*") if file.suffix in suffixes)
    names = {path.name, *(file.name for file in candidates if _is_same_generator(file, meta))}
    data = trained.meta.get("data")  # in a checkpoint, with the fingerprint of the data
    fingerprint = data.get("fingerprint") if isinstance(data, dict) else None
    rows = model_card.evaluations(run, meta.get("images"), fingerprint)
    return model_card.render(meta, sorted(names, key=lambda name: (suffixes.index(Path(name).suffix), name)), rows)


def _is_same_generator(file: Path, meta: dict[str, Any]) -> bool:
    """Whether `file` is an export of the generator that `meta` describes, in whatever format."""
    if file.name.startswith("."):
        return False
    try:
        stored = formats.read_meta(file)
    except (ArgumentError, ModuleNotFoundError):
        return False
    return all(stored.get(key) == meta.get(key) for key in ("variant", "images", "networks", "alpha"))


def _write_together(files: dict[Path, bytes]) -> None:
    """Write files of one folder, which is made if need be. If one cannot be written, nothing changes on disk."""
    folder = next(iter(files)).parent
    new_folders = [p for p in (folder, *folder.parents) if not p.exists()]
    partials: list[AtomicFile] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            partials.append(AtomicFile(file))
            partials[-1].write(content)
        for partial in partials:  # a full disk shows here at the latest, before any file has its name
            partial.flush()
        for partial in partials:
            partial.commit()
    except BaseException:
        for partial in partials:
            partial.discard()
        for p in new_folders:
            with contextlib.suppress(OSError):
                p.rmdir()
        raise
