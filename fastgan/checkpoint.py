"""Checkpoints of a run: their layout on disk, written whole or not at all, read without unpickling anything.

    RUN/checkpoints/kimg-000123.456/    and best/, with --keep-best
        generator.safetensors   moving average of the generator's weights: what samples are drawn from
        training.safetensors    both networks, both optimizers' state, random state of every rank
        checkpoint.json         schema, variant, networks, images seen, size and hash of the files above

The folder is written under another name, flushed to disk and renamed, which is atomic: a crash at any moment leaves the
checkpoint before it, and a folder with the final name is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgan.errors import ArgumentError
from fastgan.utils.old_names import RENAMED, current_names

SCHEMA = 1
_GENERATOR, _TRAINING, _META = "generator.safetensors", "training.safetensors", "checkpoint.json"
_REPLACED = ".replaced-"
BEST = "best"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files have been verified."""

    path: Path
    meta: dict[str, Any]

    def generator(self) -> dict[str, Tensor]:
        """State of the averaged generator, CPU tensors."""
        return load_file(self.path / _GENERATOR)

    def training(self) -> dict[str, dict[str, Tensor]]:
        """Everything else, by group: "generator", "discriminator", "optimizer_g", "optimizer_d", "random"."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(self.path / _TRAINING).items():
            group, name = key.split(":", 1)
            groups.setdefault(RENAMED.get(group, group), {})[name] = value
        return groups


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(meta: dict[str, Any]) -> str:
    """Hash of a record as it comes back from JSON."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(meta)), sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def folder(run: Path) -> Path:
    return run / "checkpoints"


def existing(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder(run).glob("kimg-*") if (p / _META).is_file())


def recover(run: Path) -> None:
    """Restore the name of a checkpoint whose replacement stopped between two renames.

    Only for the process that has locked the run: another one may be between the two right now.
    """
    for replaced in folder(run).glob(f"{_REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if not final.exists():
            replaced.rename(final)


def save(
    run: Path,
    meta: dict[str, Any],
    generator: dict[str, Tensor],
    training: dict[str, dict[str, Tensor]],
    keep: int,
) -> Path:
    """Write a checkpoint of `run`, and delete the oldest ones until `keep` are left, this one among them.

    Args:
        run: the run directory.
        meta: plain values; "images" (real images seen) names the checkpoint.
        generator, training: as `Checkpoint.generator` and `Checkpoint.training` return them.
        keep: how many checkpoints the run has afterwards.

    Returns:
        Its folder.

    Raises:
        OSError: the disk is full or not writable. What was written is removed; older checkpoints stay.
    """
    final = folder(run) / f"kimg-{meta['images'] / 1000:010.3f}"
    partial = final.with_name(f".writing-{final.name}")
    recover(run)
    for left in folder(run).glob(".*-kimg-*"):
        shutil.rmtree(left, ignore_errors=True)  # left by a process that was killed while it wrote or deleted
    try:
        partial.mkdir(parents=True)
        save_file(_storable(generator), partial / _GENERATOR)
        flat = {f"{group}:{name}": tensor for group, tensors in training.items() for name, tensor in tensors.items()}
        save_file(_storable(flat), partial / _TRAINING)
        files = {}
        for name in (_GENERATOR, _TRAINING):
            _flush(partial / name)
            files[name] = {"bytes": (partial / name).stat().st_size, "sha256": _hash(partial / name)}
        record = {"schema": SCHEMA, **meta, "files": files}
        (partial / _META).write_text(json.dumps({**record, "sha256": _digest(record)}, indent=1))
        _flush(partial / _META)
        _flush(partial)
        # The name is taken only where a run was resumed from an older checkpoint; the state is the same.
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _flush(final.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(errno.EIO, str(error)) from error  # safetensors reports a full disk so
    except BaseException:  # also an interrupt between the two renames
        recover(run)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    others = [path for path in existing(run) if path != final]
    for old in others[: max(len(others) - keep + 1, 0)]:
        # Renamed first: a kill halfway through then leaves nothing that looks like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".dropped-{old.name}")))
    return final


def keep_best(run: Path, path: Path) -> Path:
    """Keep checkpoint `path` of `run` under the name checkpoints/best, whatever `keep` says; replaces the best before.

    The files are the same on disk where it has hard links.

    Raises:
        OSError: it cannot be written; the best before stays.
    """
    final = folder(run) / BEST
    partial, replaced = (final.with_name(f"{prefix}{BEST}") for prefix in (".writing-", _REPLACED))
    recover(run)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(path, partial, copy_function=_link)
        _flush(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _flush(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        recover(run)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
        _flush(Path(target))


def read(path: Path, flag: str) -> Checkpoint:
    """Open the checkpoint in folder `path`, or the newest one of run `path`, and verify its files.

    Raises:
        ArgumentError: there is none, its schema is unknown, or a file is missing, truncated or changed.
    """
    if not (path / _META).is_file():
        found = existing(path)
        if not found:
            raise ArgumentError(flag, str(path), "must be a run with a checkpoint, or a folder in its checkpoints/")
        try:
            return read(found[-1], flag)
        except (ArgumentError, FileNotFoundError):
            if found[-1].exists():
                raise
            return read(path, flag)  # a process that trains has replaced it by a newer one
    try:
        meta = json.loads((path / _META).read_text())
        digest, files, schema = meta.pop("sha256"), meta["files"], meta["schema"]
        if schema == SCHEMA and digest != _digest(meta):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArgumentError(flag, str(path), f"its {_META} is damaged; {_older(path)}") from None
    except PermissionError as error:
        raise ArgumentError(flag, str(path), f"its {_META} cannot be read ({error.strerror})") from None
    if schema != SCHEMA:
        raise ArgumentError(flag, str(path), f"its schema is {schema}; this version reads {SCHEMA}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise ArgumentError(flag, str(path), f"{name} is missing; {_older(path)}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ArgumentError(
                flag, str(path), f"{name} is truncated ({size} of {expected['bytes']} bytes); {_older(path)}"
            )
        if _hash(file) != expected["sha256"]:
            raise ArgumentError(flag, str(path), f"{name} has changed since it was written; {_older(path)}")
    return Checkpoint(path, current_names(meta))


def _older(path: Path) -> str:
    path = path.resolve()
    older = [p for p in existing(path.parent.parent) if p.name < path.name]
    return f"the checkpoint before it is {older[-1]}" if older else "there is no older one"
