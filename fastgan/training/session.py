"""From a configuration to a trainer: what `fastgan train` and `fastgan.training.train` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgan.config import Config, replace, validate
from fastgan.config.variants import VARIANTS
from fastgan.errors import ArgumentError
from fastgan.training import run_directory, run_setup, torch_settings
from fastgan.training.auto import stage_seconds
from fastgan.training.distributed import rendezvous
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.distributed.rank_consistency import require_same_on_all_ranks, shared_settings
from fastgan.training.from_config import validate_stages
from fastgan.training.initial_weights import initial_weights
from fastgan.training.trainer import Trainer


@dataclass(frozen=True)
class Request:
    """What is trained.

    Attributes:
        config: complete and valid.
        variant, preset: names, for the record.
        resume: run or checkpoint folder to resume, if any.
        sets_accumulation: whether `config` decides the accumulation; else a resumed run keeps the cut of its batches.
        costs: seconds for each image at each resolution, where they were measured.
    """

    config: Config
    variant: str
    preset: str
    resume: Path | None = None
    sets_accumulation: bool = True
    costs: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """A trainer that has its run directory and has not taken a step.

    Attributes:
        trainer: see there.
        resumed: whether it continues from a checkpoint.
        note: line for the log, or None.
    """

    trainer: Trainer
    resumed: bool
    note: str | None


def open_session(request: Request, world: ProcessGroup, locks: ExitStack, patience: float = 0.0) -> Session:
    """The images, the weights and the run directory of a request, and the trainer for them; a collective.

    Args:
        locks: keeps the lock of the run until it is closed.
        patience: seconds to wait for another process that trains in the run.

    Raises:
        ArgumentError: something cannot be used. A new run directory is made last.
    """
    config, variant, resume = request.config, request.variant, request.resume
    if config.system.sync_bn and world.device.type != "cuda":
        raise ArgumentError("--sync-bn", True, "it needs GPUs: remove it on a CPU")
    require_same_on_all_ranks(world, shared_settings(config))
    run = run_setup.choose_run(world, variant, config.run.out, resume, locks, patience)
    stored = run_setup.checkpoint_to_resume(resume, run, variant, config)
    files = None if stored is None else (str(stored.path), stored.meta["files"])
    require_same_on_all_ranks(world, {"the checkpoint to resume": files})
    if stored is not None and not request.sets_accumulation:
        config = run_setup.keep_batch_cut(config, stored, world)
    validate_stages(config, world.size)
    source = run_setup.open_images(config, world)
    if world.heartbeat is not None and stored is not None:
        world.heartbeat.run, world.heartbeat.last_good = run, stored.path
    initial = initial_weights(config, source) if stored is None else None
    seen = 0 if stored is None else stored.meta["images"]
    costs = request.costs or stage_seconds(config, variant, source, world, seen)
    weights = None if initial is None else initial.state
    trainer = Trainer(config, variant, world, source, run, stored, weights, costs)
    run = run_setup.create_run(world, run, trainer.config, variant, request.preset, resume, locks)
    trainer.run_path = run
    if world.heartbeat is not None:
        world.heartbeat.run = run
    return Session(trainer, stored is not None, None if initial is None else initial.note)


def train(
    variant: str = "pggan", preset: str = "digits", *, resume: str | Path | None = None, **sections: dict[str, Any]
) -> Path:
    """Train as `fastgan train` does, in this process or as one of a launcher's ranks; see `fastgan.training.train`."""
    if variant not in VARIANTS:
        raise ArgumentError("variant", variant, f"must be one of {', '.join(VARIANTS)}")
    if preset not in VARIANTS[variant].presets:
        raise ArgumentError("preset", preset, f"must be {', '.join(VARIANTS[variant].presets)} for {variant}")
    try:
        config = replace(VARIANTS[variant].config(preset), **sections)
    except (AttributeError, TypeError) as error:  # no such section or field
        raise ArgumentError("sections", sorted(sections), f"must be those of fastgan.config.Config ({error})") from None
    validate(config)
    if resume is None and config.run.out is not None:
        run_directory.check_free(Path(config.run.out))
    torch_settings.apply(config)
    system = config.system
    world = rendezvous.start(
        system.engine,
        system.device,
        zero=system.zero,
        deepspeed_config=system.deepspeed_config,
        timeout=system.timeout,
    )
    with world.guard(), ExitStack() as locks:
        try:
            where = None if resume is None else Path(resume)
            session = open_session(Request(config, variant, preset, where), world, locks)
            if world.main and session.note is not None:
                print(session.note, flush=True)
            session.trainer.run()
            world.done()
        finally:
            rendezvous.stop()
    return session.trainer.run_path
