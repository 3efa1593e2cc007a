"""What all ranks do together before the first step: the run directory, the images, the checkpoint to resume from."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from fastgan import checkpoint, data
from fastgan.checkpoint import Checkpoint
from fastgan.config import Config, replace
from fastgan.config.files import write_yaml
from fastgan.config.growth import stages_of
from fastgan.config.images import source_arguments
from fastgan.data.preparation.verification import spot_check
from fastgan.data.prepared import PreparedSource
from fastgan.errors import ArgumentError
from fastgan.training import run_directory
from fastgan.training.checkpoints.resume import accumulation_for
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.distributed.rank_consistency import require_same_on_all_ranks
from fastgan.training.intervals import checkpoint_kimg
from fastgan.utils.stored_values import MALFORMED


def choose_run(
    world: ProcessGroup, variant: str, out: str | None, resume: Path | None, locks: ExitStack, patience: float
) -> Path:
    """The run directory, refused before anything is written if it holds another run; a collective.

    Args:
        out, resume: as on the command line.
        locks: keeps the lock of a run that is resumed until it is closed.
        patience: seconds to wait for another process that trains in the run.

    Raises:
        ArgumentError: on every rank: it is in use, cannot be written, or is not a run.
    """
    if resume is None:
        run = Path(world.broadcast(out or str(run_directory.default(variant))))
        if out is not None:
            run_directory.check_free(run)
        return run
    run = run_directory.of(str(resume))
    if out not in (None, str(run)) and Path(str(out)) != run:
        raise ArgumentError("--out", out, f"it is not needed: --resume continues in {run}")
    failure = None
    if world.main:
        try:
            locks.enter_context(run_directory.locked(run, "--resume", patience))
            with run_directory.writable(run):
                checkpoint.recover(run)
        except ArgumentError as error:
            failure = error
    failure = world.broadcast(failure)
    if failure is not None:
        raise failure
    return run


def create_run(
    world: ProcessGroup, run: Path, config: Config, variant: str, preset: str, resume: Path | None, locks: ExitStack
) -> Path:
    """Make the run directory on the first rank and write config.yaml; a collective.

    Returns:
        The directory, which has another name than `run` where an unnamed run found that taken.

    Raises:
        ArgumentError: on every rank, if it could not be made.
    """
    failure = None
    if world.main:
        try:
            if resume is None:
                run = run_directory.make(run, named=config.run.out is not None)
                locks.enter_context(run_directory.locked(run, "--out"))
                run_directory.check_free(run)  # another process may have taken it since `choose_run`
            with run_directory.writable(run):
                write_yaml(config, variant, preset, run / "config.yaml")
        except ArgumentError as error:
            failure = error
    failure, run = world.broadcast((failure, run))
    if failure is not None:
        raise failure
    return run


def open_images(config: Config, world: ProcessGroup) -> data.Source:
    """The images, the same on all ranks; each host may have a copy of its own. A collective.

    Raises:
        ArgumentError: there are none, a host's copy is damaged or differs, or labels are missing.
    """
    source, fault = None, None
    try:
        source = data.open_source(**source_arguments(config))
        # One rank of each host compares the host's copy with its manifest.
        if isinstance(source, PreparedSource) and world.size > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
            found = spot_check(source.manifest, config.schedule.resolution)
            if found is not None:
                path = str(source.manifest.path)
                raise ArgumentError("--data", path, f"{found.name} {found.problem}; copy the set to this host again")
    except ArgumentError as error:
        source, fault = None, error
    seen = str(fault) if source is None else f"{len(source)} images, {source.fingerprint}"
    require_same_on_all_ranks(world, {"--data": seen})
    if source is None:
        assert fault is not None
        raise fault
    if world.main:
        for line in source.remarks():
            print(line, file=sys.stderr)
    if config.networks.conditional and source.num_classes == 0:
        raise ArgumentError("--conditional", True, f"{config.data.data} has no labels: remove it")
    return source


def _has_checkpoint(resume: Path) -> bool:
    """Whether there is anything to read: a run that stopped before its first checkpoint starts again."""
    stored = (resume / "checkpoint.json").is_file() or bool(checkpoint.existing(resume))
    return stored or not (resume / "config.yaml").is_file()


def _images_seen(run: Path) -> int | None:
    """The images seen by the record of a run: the last whole row of metrics.jsonl, or the newest sample sheet.

    None: there are rows, and none can be read.
    """
    metrics, seen, whole = run / "metrics.jsonl", 0, False
    if metrics.is_file():  # and not a pipe, which would block
        for line in metrics.read_bytes().splitlines(keepends=True):
            whole = whole or line.endswith(b"\n")
            with suppress(*MALFORMED):
                seen = int(json.loads(line)["images"])
    for sheet in (run / "samples").glob("kimg-*"):
        with suppress(ValueError):
            seen = max(seen, round(1000 * float(sheet.stem.removeprefix("kimg-"))))
    return None if whole and not seen else seen


def _refuse_lost_checkpoints(run: Path, config: Config) -> None:
    """Refuse to start a run again that has trained past its first checkpoint, as if its record were worth nothing.

    Raises:
        ArgumentError: checkpoints are missing, on a disk that is not mounted, say.
    """
    seen = _images_seen(run)
    # A row of the step that writes the first checkpoint comes before it; a kill between the two loses nothing.
    step = config.optimizer.n_critic * config.schedule.batch
    unreadable = [path.name for path in checkpoint.folder(run).glob("kimg-*")]
    if unreadable or seen is None or seen >= 1000 * checkpoint_kimg(config) + step:
        lost = f"{unreadable[0]} has no checkpoint.json" if unreadable else "there is none in checkpoints/"
        done = "its metrics.jsonl cannot be read" if seen is None else f"it has trained to {seen / 1000:g} kimg"
        problem = f"{done}, and {lost}; restore it, or start a new run"
        raise ArgumentError("--resume", str(run), problem)


def checkpoint_to_resume(resume: Path | None, run: Path, variant: str, config: Config) -> Checkpoint | None:
    """The checkpoint that a run resumes from; None for a new run, and for one that has not written its first.

    Raises:
        ArgumentError: it is damaged or missing, not the newest of the run, or of another variant.
    """
    if resume is None:
        return None
    if not _has_checkpoint(resume):
        _refuse_lost_checkpoints(run, config)
        return None
    stored = checkpoint.read(resume, "--resume")
    stored.require("variant", "networks", "images", "steps", "ema_steps", "resolution", "world_size", "seed", "data")
    newest = checkpoint.existing(run)[-1:]
    if newest and not newest[0].samefile(stored.path):
        problem = f"the run has a newer one, {newest[0]}; to resume from here, copy the run without what is newer"
        raise ArgumentError("--resume", str(resume), problem)
    if stored.meta["variant"] != variant:
        problem = f"it is a checkpoint of {stored.meta['variant']}, and --variant says {variant}"
        raise ArgumentError("--resume", str(resume), problem)
    return stored


def keep_batch_cut(config: Config, stored: Checkpoint, world: ProcessGroup) -> Config:
    """`config` with the accumulation that keeps batches cut as before, where the number of ranks has changed."""
    schedule, before = config.schedule, stored.meta["world_size"]
    if before == world.size:
        return config
    resolutions = [stage.resolution for stage in stages_of(config)]
    parts = before * stored.meta.get("accumulation", schedule.accumulation)
    accumulation = accumulation_for(parts, world.size, schedule, resolutions)
    if accumulation is None:
        return config  # `validate_stages` refuses it and names batches that can be used
    if world.main:
        print(
            f"{world.size} ranks where there were {before}: --accumulation {accumulation} keeps the batch as it was",
            flush=True,
        )
    return replace(config, schedule={"accumulation": accumulation})
