"""Checkpoints of a run: their layout on disk, written whole or not at all, read without unpickling anything.

    RUN/checkpoints/kimg-000123.456/    and best/, with --keep-best
        generator.safetensors   moving average of the generator's weights: what samples are drawn from
        training.safetensors    both networks, both optimizers' state, random state and meters of every rank
        checkpoint.json         schema, variant, networks, images seen, size and hash of the files above

The folder is written under another name, flushed to disk and renamed, which is atomic: a crash at any moment leaves the
checkpoint before it, and a folder with the final name is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgan.errors import ArgumentError, printable
from fastgan.utils.files import write_atomic
from fastgan.utils.old_names import RENAMED, current_names
from fastgan.utils.stored_values import MALFORMED, checkpoint_problem
from fastgan.utils.text import first_line

SCHEMA = 1
_GENERATOR, _TRAINING, _META = "generator.safetensors", "training.safetensors", "checkpoint.json"
_REPLACED = ".replaced-"
KEEP = "KEEP"
"""File that keeps the checkpoint in whose folder it is, whatever `--keep` says; its text is the reason."""
BEST = "best"
"""Name of the folder of the best checkpoint, beside the others."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files have been verified.

    Attributes:
        path: its folder.
        meta: its plain values; those that are there are of the right type and in range.
        flag: what the user named it by, for errors.
    """

    path: Path
    meta: dict[str, Any]
    flag: str = "RUN"

    def require(self, *names: str) -> None:
        """Raise ArgumentError if one of the plain values is missing."""
        for name in names:
            if name not in self.meta:
                raise ArgumentError(self.flag, str(self.path), f"{_META} has no {name}; {_older(self.path)}")

    def _load(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file.

        Raises:
            ArgumentError: it is damaged, or a value is NaN or infinite: what is computed from it would be, too.
        """
        try:
            tensors = load_file(self.path / name)
        except SafetensorError as error:
            raise ArgumentError(
                self.flag, str(self.path), f"{name} is damaged ({error}); {_older(self.path)}"
            ) from None
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                problem = f"{printable(key[:80])} in {name} is not finite; {_older(self.path)}"
                raise ArgumentError(self.flag, str(self.path), problem)
        return tensors

    def generator(self) -> dict[str, Tensor]:
        """State of the averaged generator, CPU tensors."""
        return self._load(_GENERATOR)

    def training(self) -> dict[str, dict[str, Tensor]]:
        """Everything else, by group: "generator", "discriminator", "optimizer_g", "optimizer_d", "random", "meters"."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in self._load(_TRAINING).items():
            group, _, name = key.partition(":")
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


def mark(run: Path, images: int, reason: str) -> Path | None:
    """Mark the newest checkpoint of at most `images` images seen, or else the oldest one: `save` never deletes it.

    Args:
        run: the run directory.
        images: see above.
        reason: written into the mark, the file KEEP in the checkpoint's folder.

    Returns:
        The checkpoint, or None if the run has none.
    """
    found = existing(run)
    if not found:
        return None
    before = [path for path in found if _kimg(path) * 1000 <= images + 0.5]
    chosen = (before or found[:1])[-1]
    write_atomic(chosen / KEEP, reason.encode() + b"\n")
    return chosen


def _kimg(path: Path) -> float:
    try:
        return float(path.name.removeprefix("kimg-"))
    except ValueError:  # a folder of the user's
        return math.inf


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
    """Write a checkpoint of `run`, and delete the oldest ones that `mark` has not marked until `keep` are left.

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
    others = [path for path in existing(run) if path != final and not (path / KEEP).exists()]
    for old in others[: max(len(others) - keep + 1, 0)]:
        # Renamed first: a kill halfway through then leaves nothing that looks like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".dropped-{old.name}")))
    return final


def read_named(path: str, flag: str) -> Checkpoint:
    """`read`, of a path as a user writes it."""
    try:
        return read(Path(path).expanduser(), flag)
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that does not exist
        raise ArgumentError(flag, path, f"must be a run that can be read ({first_line(error)})") from None


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
        shutil.copytree(path, partial, ignore=shutil.ignore_patterns(KEEP), copy_function=_link)
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
        digest, schema = meta.pop("sha256"), meta["schema"]
        if schema == SCHEMA and digest != _digest(meta):
            raise ValueError
    except MALFORMED:
        raise ArgumentError(flag, str(path), f"its {_META} is damaged; {_older(path)}") from None
    except PermissionError as error:
        raise ArgumentError(flag, str(path), f"its {_META} cannot be read ({error.strerror})") from None
    if schema != SCHEMA:
        raise ArgumentError(flag, str(path), f"its schema is {schema}; this version reads {SCHEMA}")
    meta = current_names(meta)
    problem = checkpoint_problem(meta) or ("" if {*meta.get("files", ())} == {_GENERATOR, _TRAINING} else "files")
    if problem:
        raise ArgumentError(flag, str(path), f"its {_META} is damaged: {problem}; {_older(path)}")
    for name, expected in meta["files"].items():
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
    return Checkpoint(path, meta, flag)


def _older(path: Path) -> str:
    path = path.resolve()
    older = [p for p in existing(path.parent.parent) if p.name < path.name]
    return f"the checkpoint before it is {older[-1]}" if older else "there is no older one"
