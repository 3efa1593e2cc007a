"""Train one of nine GAN variants: `deepspeed fastgan/train.py --variant pggan`, torchrun or `fastgan train`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastgan import __version__
from fastgan.cli import run_request
from fastgan.cli.main import command
from fastgan.cli.output import say
from fastgan.cli.run_request import RunFlags, RunRequest
from fastgan.errors import ArgumentError
from fastgan.training import run_directory
from fastgan.training.resilience import supervisor
from fastgan.training.resilience.heartbeat import EXIT_RANK_FAULT
from fastgan.utils.text import readable_duration

if TYPE_CHECKING:
    from fastgan.training.distributed.process_group import ProcessGroup
    from fastgan.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Train(RunFlags):
    """Train a GAN on images: with no argument, a progressive GAN on scikit-learn's handwritten digits."""

    hostfile: str | None = None
    """Start the ranks with DeepSpeed on these hosts, lines of `HOST slots=N`; None: this process, or its launcher's."""
    max_restarts: int | None = None
    """Restarts after a fault of a rank, a host or the network, each from the last checkpoint; None: no supervision."""
    min_nodes: int | None = None
    """Hosts of --hostfile that suffice for a start; None: all of them."""
    ssh_port: int | None = None
    """Port of the hosts' ssh servers; None: ssh's default."""
    dry_run: bool = False
    """Print the stages of the run and exit."""


def parse(argv: list[str]) -> RunRequest:
    """The run that the flags of `fastgan train` ask for; see `run_request.parse`."""
    return run_request.parse(argv, Train, "fastgan train")


@command
def main(argv: list[str]) -> int:
    began = time.monotonic()
    request = parse(argv)
    config = request.config
    assert isinstance(request.flags, Train)
    if request.flags.dry_run:
        return _dry_run(request)
    supervision = supervisor.parse_supervision(argv)
    if supervision is not None:
        return _supervise(supervision, request)
    if "RANK" not in os.environ:
        named = f"{request.variant}, " if request.names_variant or request.preset != "auto" else ""
        say(f"fastgan {__version__}: {named}{request.preset} preset; loading torch")
    from fastgan.training import torch_settings
    from fastgan.training.distributed import rendezvous
    from fastgan.training.resilience.signals import stop_on_closed_output

    torch_settings.apply(config)
    hosts = supervisor.rank_hosts(argv)
    world = rendezvous.start(
        config.system.engine,
        config.system.device,
        zero=config.system.zero,
        deepspeed_config=config.system.deepspeed_config,
        timeout=config.system.timeout,
        hosts=hosts,
    )
    # A supervisor that restarts without an unreachable host may be faster than the end of that host's rank.
    patience = config.system.timeout / 2 if hosts else 0.0
    with world.guard(), stop_on_closed_output(), ExitStack() as locks:
        try:
            code = _train(request, world, began, locks, patience)
            world.done()
            return code
        except run_directory.RunLocked as error:
            if not hosts:
                raise
            if world.main:
                say(f"fastgan: {error}", error=True)
            return EXIT_RANK_FAULT  # a dead host may hold a shared lock for some time: the supervisor tries again
        finally:
            rendezvous.stop()


def _dry_run(request: RunRequest) -> int:
    """Print what a run would be; with --preset auto or --hours, its first rank measures steps."""
    from fastgan.cli.auto_settings import settle
    from fastgan.training import torch_settings
    from fastgan.training.distributed.process_group import ProcessGroup
    from fastgan.training.distributed.rendezvous import pick_device
    from fastgan.training.dry_run import describe

    if os.environ.get("RANK", "0") != "0":
        return 0
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch_settings.apply(request.config)
    world = ProcessGroup(0, 1, pick_device(request.config.system.device), "torch", "dry run")
    settled = settle(request, world, ranks)
    request = settled.request
    text = describe(request.variant, request.preset, request.config, ranks, settled.costs)
    say("\n".join([*settled.lines, text, *request.notes]))
    return 0


def _supervise(supervision: supervisor.Supervision, request: RunRequest) -> int:
    """Start the ranks of the run and watch over them."""
    config, resumed = request.config, request.resume is not None
    if resumed or config.run.out is not None:
        run = run_directory.of(str(request.resume)) if resumed else Path(str(config.run.out))
        return supervisor.Supervisor(supervision, run, resumed, config.system.timeout).supervise()
    run = run_directory.make(run_directory.default(request.variant), named=False)
    try:
        return supervisor.Supervisor(supervision, run, resumed, config.system.timeout).supervise()
    finally:
        with suppress(OSError):  # still empty if the ranks were refused before they wrote anything
            run.rmdir()


def _train(request: RunRequest, world: ProcessGroup, began: float, locks: ExitStack, patience: float) -> int:
    """The work of each rank once it has met the others; `locks` and `patience` as in `session.open_session`."""
    from fastgan.cli.auto_settings import settle
    from fastgan.training import session
    from fastgan.training.observability.runaway import RunawayError
    from fastgan.training.trainer import NonFiniteError

    if request.resume is None and request.config.run.out is not None:
        run_directory.check_free(Path(request.config.run.out))  # before anything is measured
    settled = settle(request, world, world.size)
    request = settled.request
    wanted = session.Request(
        request.config, request.variant, request.preset, request.resume, request.sets_accumulation, settled.costs
    )
    opened = session.open_session(wanted, world, locks, patience)
    trainer, run = opened.trainer, opened.trainer.run_path
    if world.main:
        for note in [*settled.lines, *([opened.note] if opened.note is not None else [])]:
            say(note)
        _announce(trainer, request, resumed=opened.resumed)
    try:
        stopped = trainer.run()
    except (NonFiniteError, RunawayError) as error:  # raised by all ranks together
        if world.main:
            say(f"fastgan: {error}", error=True)
        return 1
    except OSError as error:
        from fastgan import checkpoint

        good = checkpoint.existing(run)[-1:]
        last = f"the last checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        raise ArgumentError("--out", str(run), f"it could not be written ({error}); {last}") from None
    if world.main:
        _report(trainer, stopped, time.monotonic() - began)
    return 0


def _announce(trainer: Trainer, request: RunRequest, *, resumed: bool) -> None:
    """Print what is about to run."""
    from fastgan.config.growth import short_run_warning

    world, run = trainer.world, trainer.run_path
    say(trainer.feed.pipeline.describe())
    resuming = f", resuming at {trainer.images / 1000:g} kimg" if resumed else ""
    ranks = f"{world.size} x {world.device.type}"
    say(f"engine {world.engine} ({world.reason}), {ranks}, run {run}{resuming}")
    say(trainer.precision_note)
    warning = short_run_warning(trainer.config)
    for line in [*request.notes, *([warning] if warning is not None else [])]:
        say(line)
    if request.resume is not None and not resumed:
        say(f"{run} has no checkpoint: it starts from the beginning")
    if trainer.images >= trainer.total:
        say(f"the run is complete; --kimg {2 * trainer.total / 1000:g} would make it longer")


def _report(trainer: Trainer, stopped: int | None, seconds: float) -> None:
    """Print how the run ended, and the next command."""
    run, quoted = trainer.run_path, shlex.quote(str(trainer.run_path))
    images, took = f"{trainer.images / 1000:g} kimg", readable_duration(seconds)
    if stopped:
        name = signal.Signals(stopped).name
        say(f"stopped by {name} at {images} after {took}; resume with: fastgan train --resume {quoted}")
    else:
        say(f"done: {images} in {took}; samples in {run / 'samples'}, more with: fastgan sample {quoted}")
