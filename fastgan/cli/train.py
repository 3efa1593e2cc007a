"""Train one of eight GAN variants: `deepspeed fastgan/train.py --variant pggan`, torchrun or `fastgan train`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fastgan import __version__
from fastgan.cli.main import command
from fastgan.config import Config, check, merge, read_yaml, replace, write_yaml
from fastgan.config.variants import VARIANTS, Preset
from fastgan.errors import ArgumentError
from fastgan.training import run_directory
from fastgan.training.resilience import supervisor
from fastgan.training.resilience.heartbeat import FAULT

if TYPE_CHECKING:
    from fastgan.checkpoint import Checkpoint
    from fastgan.data import Source
    from fastgan.training.distributed.process_group import ProcessGroup


DEFAULT_VARIANT = "pggan"

_NAMES = {"variant": f"must be {', '.join(VARIANTS)}", "preset": "must be paper or digits"}


@dataclasses.dataclass(frozen=True)
class Asked(Config):
    """A run as a command line names it; what `parse` reads."""

    variant: str = DEFAULT_VARIANT
    """gan, dcgan, lsgan, wgan, wgan-gp, wgan-div, sagan or pggan."""
    preset: str | None = None
    """paper (the published recipe) or digits (small); None: digits for --data digits or stacked-digits, else paper."""
    config: str | None = None
    """YAML file over the preset and under the flags; a run's config.yaml is one."""
    resume: str | None = None
    """A run or checkpoint folder to go on with; auto: the run in --out, or the variant's trained last, if any."""


@dataclasses.dataclass(frozen=True)
class Train(Asked):
    """Train a GAN on images: with no argument, a progressive GAN on scikit-learn's handwritten digits."""

    hostfile: str | None = None
    """Start the ranks with DeepSpeed on these hosts, lines of `HOST slots=N`; None: this process, or its launcher's."""
    max_restarts: int | None = None
    """Starts after a fault of a rank, a host or the network, each from the last checkpoint; None: no supervision."""
    min_nodes: int | None = None
    """Hosts of --hostfile that suffice for a start; None: all of them."""
    ssh_port: int | None = None
    """Of the hosts' ssh servers; None: ssh's own choice."""
    dry_run: bool = False
    """Print the plan and exit."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line."""

    config: Config
    variant: str
    preset: str
    resume: Path | None
    asked: Asked
    accumulation: bool = False
    """Whether --accumulation was given: a resumed run otherwise keeps the cut of its batches, on whatever ranks."""


def _first_pass(argv: list[str], prog: str) -> argparse.Namespace:
    """The flags that decide what the defaults of all others are."""
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    for flag in ("--variant", "--preset", "--config", "--data", "--resume", "--out"):
        parser.add_argument(flag)
    return parser.parse_known_args(argv)[0]


def _name(values: dict[str, Any], key: str, where: str) -> str | None:
    """The variant or preset that a file names, if it does.

    Raises:
        ArgumentError: it is no name.
    """
    name = values.get(key)
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"{where}: {key}", name, _NAMES[key])
    return name


def _prepared_resolution(data: object) -> int | None:
    """The highest resolution of a prepared set, which limits the preset's; None for other data."""
    path = Path(str(data).removeprefix("prepared:")).expanduser()
    if not (path / "manifest.json").is_file():
        return None
    from fastgan.data.prepared import read_manifest

    return read_manifest(path).resolution


def parse(argv: list[str], kind: type[Asked] = Train, prog: str = "fastgan train") -> Request:
    """The run that a command line asks for: preset, then file, then flags; `kind` has the flags of the command `prog`.

    Raises:
        ArgumentError: a value that cannot be; SystemExit: --help, or a flag that does not exist.
    """
    # DeepSpeed's launcher adds the first, whose variable serves, and ours the others.
    argv = [flag for flag in argv if not flag.startswith(("--local_rank=", supervisor.HOSTS, supervisor.JOB))]
    first = _first_pass(argv, prog)
    for flag in ("out", "resume"):
        path = getattr(first, flag) or ""
        if path.encode(errors="replace").decode() != path:  # TensorBoard and config.yaml take no other
            raise ArgumentError(f"--{flag}", path, "must be a path in UTF-8")
    layers: list[tuple[dict[str, Any], str]] = []
    if first.config:
        layers.append((read_yaml(Path(first.config), "--config"), first.config))
    names = {"variant": first.variant, "preset": first.preset}
    for values, where in layers:
        names = {key: name or _name(values, key, where) for key, name in names.items()}
    resume: Path | None = None
    if first.resume == "auto":
        resume = run_directory.newest(first.out, names["variant"] or DEFAULT_VARIANT)
    elif first.resume:
        resume = Path(first.resume)
    if resume is not None:
        run = run_directory.of(str(resume))
        stored = read_yaml(run / "config.yaml", "--resume")
        for key, name in names.items():
            was = _name(stored, key, str(run / "config.yaml"))
            if name is not None and was is not None and name != was:
                raise ArgumentError(f"--{key}", name, f"the run {run} is of {was}")
        if isinstance(stored.get("run"), dict):
            stored["run"].pop("out", None)  # a run goes on where it is now, moved or not
        layers.insert(0, (stored, str(run / "config.yaml")))
    chosen = {"data": "digits", "variant": DEFAULT_VARIANT, "preset": None}
    for values, _ in layers:
        for key in ("variant", "preset"):
            chosen[key] = values.pop(key, chosen[key])
        section = values.get("data")
        chosen["data"] = section.get("data", chosen["data"]) if isinstance(section, dict) else chosen["data"]
    variant = first.variant or chosen["variant"]
    if variant not in VARIANTS:
        raise ArgumentError("--variant", variant, _NAMES["variant"])
    preset = first.preset or chosen["preset"]
    if preset is None:
        preset = "digits" if (first.data or chosen["data"]) in ("digits", "stacked-digits") else "paper"
    if preset not in ("paper", "digits"):
        raise ArgumentError("--preset", preset, _NAMES["preset"])
    recipe: Preset = "paper" if preset == "paper" else "digits"
    # What a run's file does not have is newer than the run: the value that changes nothing, not the preset's.
    base = VARIANTS[variant].config(recipe) if resume is None else Config()
    held = _prepared_resolution(first.data or chosen["data"])
    if held is not None and resume is None:
        base = replace(base, schedule={"resolution": min(base.schedule.resolution, held)})
    for values, where in layers:
        schedule = values.get("schedule")
        base = _one_growth(merge(base, values, where), schedule if isinstance(schedule, dict) else ())
    defaults = kind(
        **{f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}, variant=variant, preset=first.preset
    )
    asked = tyro.cli(kind, args=argv, default=defaults, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    config = Config(**{f.name: getattr(asked, f.name) for f in dataclasses.fields(Config)})
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")}
    config = _one_growth(config, given)
    check(config)
    return Request(config, variant, preset, resume, asked, "accumulation" in given)


def _one_growth(config: Config, given: Collection[str]) -> Config:
    """Stages by their lengths or by their share of the run: what is `given` takes the place of the other.

    Raises:
        ArgumentError: both are given.
    """
    s = config.schedule
    lengths = any(key in given and getattr(s, key) is not None for key in ("fade_kimg", "stable_kimg"))
    share = "grown_at" in given and s.grown_at is not None
    if lengths and share:
        raise ArgumentError("--grown-at", s.grown_at, "it may be left out beside --fade-kimg and --stable-kimg")
    if lengths:
        return replace(config, schedule={"grown_at": None})
    return replace(config, schedule={"fade_kimg": None, "stable_kimg": None}) if share else config


def _run_directory(request: Request, world: ProcessGroup, held: ExitStack, patience: float) -> Path:
    """Where the run is written: refused before anything is, if it holds another run or cannot be written.

    A run that is gone on with is this process's from then on, until `held` is closed.
    """
    from fastgan import checkpoint

    out = request.config.run.out
    if request.resume is None:
        run = Path(world.broadcast(out or str(run_directory.default(request.variant))))
        if out is not None:
            run_directory.check_free(run)
        return run
    run = run_directory.of(str(request.resume))
    if out not in (None, str(run)) and Path(str(out)) != run:
        raise ArgumentError("--out", out, f"it may be left out: --resume goes on in {run}")
    failure = None
    if world.main:
        try:
            held.enter_context(run_directory.locked(run, "--resume", patience))
            with run_directory.writable(run):
                checkpoint.recover(run)
        except ArgumentError as error:
            failure = error
    failure = world.broadcast(failure)
    if failure is not None:
        raise failure
    return run


def _create(run: Path, request: Request, world: ProcessGroup, held: ExitStack) -> Path:
    """Make the run directory on the first rank, and let every rank know which it is and whether that worked."""
    failure = None
    if world.main:
        try:
            if request.resume is None:
                named = request.config.run.out is not None
                run = run_directory.make(run, named)
                held.enter_context(run_directory.locked(run, "--out"))
                run_directory.check_free(run)  # another start may have had it since this was asked first
            with run_directory.writable(run):
                write_yaml(request.config, request.variant, request.preset, run / "config.yaml")
        except ArgumentError as error:
            failure = error
    failure, run = world.broadcast((failure, run))
    if failure is not None:
        raise failure
    return run


def _open_source(config: Config, world: ProcessGroup) -> Source:
    """The images, which may be a copy of each host's own, if they are the same."""
    from fastgan import data
    from fastgan.data.preparation.verification import spot_check
    from fastgan.data.prepared import PreparedSource
    from fastgan.training.distributed.rank_consistency import same

    source, fault = None, None
    try:
        source = data.open_source(config.data.data, config.schedule.resolution, config.data.channels, config.run.seed)
        # One rank of each host looks whether the host's copy is what its manifest says.
        if isinstance(source, PreparedSource) and world.size > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
            found = spot_check(source.manifest, config.schedule.resolution)
            if found is not None:
                path = str(source.manifest.path)
                raise ArgumentError("--data", path, f"{found.name} {found.problem}; copy the set to this host anew")
    except ArgumentError as error:
        source, fault = None, error
    same(world, {"--data": str(fault) if source is None else f"{len(source)} images, {source.fingerprint}"})
    if source is None:
        assert fault is not None
        raise fault
    if world.main and source.skipped:
        for file, reason in source.skipped[:10]:
            print(f"skipped {file}: {reason}", file=sys.stderr)
        print(f"skipped {len(source.skipped)} files that are no images; {len(source)} images remain", file=sys.stderr)
    if config.networks.conditional and source.num_classes == 0:
        raise ArgumentError("--conditional", True, f"{config.data.data} has no labels; it may be left out")
    return source


def prepare_torch(config: Config) -> None:
    """Process-wide settings of torch."""
    import torch

    if config.system.threads is not None:
        torch.set_num_threads(config.system.threads)
    # Squares of vanishing gradients in the optimizers are denormal, and a CPU computes with those 50 times slower. The
    # setting is one of the thread and inherited by the threads it starts, so it must come before any tensor work.
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = config.system.tf32
    torch.backends.cudnn.allow_tf32 = config.system.tf32
    if config.system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True


@command
def main(argv: list[str]) -> int:
    began = time.monotonic()
    request = parse(argv)
    config = request.config
    assert isinstance(request.asked, Train)
    if request.asked.dry_run:
        from fastgan.training.dry_run import describe

        text = describe(request.variant, request.preset, config, int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            print(text)
        return 0
    supervision = supervisor.asked(argv)
    if supervision is not None:
        return _supervise(supervision, request)
    if "RANK" not in os.environ:
        print(f"fastgan {__version__}: {request.variant}, {request.preset} preset; loading torch", flush=True)
    from fastgan.training.distributed import process_group as processes
    from fastgan.training.resilience.signals import readers_may_go

    prepare_torch(config)
    hosts = supervisor.rank_hosts(argv)
    world = processes.start(
        config.system.engine,
        config.system.device,
        zero=config.system.zero,
        deepspeed_config=config.system.deepspeed_config,
        timeout=config.system.timeout,
        hosts=hosts,
    )
    # A supervisor that starts again without a host it does not reach may be before that host's rank has given up.
    patience = config.system.timeout / 2 if hosts else 0.0
    with world.guard(), readers_may_go(), ExitStack() as held:
        try:
            code = _train(request, world, began, held, patience)
            world.done()
            return code
        except run_directory.RunLocked as error:
            if not hosts:
                raise
            if world.main:
                print(f"fastgan: {error}", file=sys.stderr, flush=True)
            return FAULT  # a host that died may hold a shared lock for some time yet: the supervisor starts again
        finally:
            processes.stop()


def _supervise(supervision: supervisor.Supervision, request: Request) -> int:
    """Start the ranks of the run and watch over them."""
    config, resumed = request.config, request.resume is not None
    if resumed or config.run.out is not None:
        run = run_directory.of(str(request.resume)) if resumed else Path(str(config.run.out))
        return supervisor.Supervisor(supervision, run, resumed, config.system.timeout)()
    run = run_directory.make(run_directory.default(request.variant), named=False)
    try:
        return supervisor.Supervisor(supervision, run, resumed, config.system.timeout)()
    finally:
        with suppress(OSError):  # it is the run's, unless the ranks were refused before they wrote anything
            run.rmdir()


def _stored(request: Request, run: Path) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        ArgumentError: it is damaged, not the run's newest, or of another variant.
    """
    from fastgan import checkpoint

    if request.resume is None or not _has_checkpoint(request.resume):
        return None
    stored = checkpoint.read(request.resume, "--resume")
    newest = checkpoint.existing(run)[-1:]
    if newest and not newest[0].samefile(stored.path):
        raise ArgumentError(
            "--resume",
            str(request.resume),
            f"the run has a newer one, {newest[0]}; to go on from here, copy the run without what is newer",
        )
    if stored.meta["variant"] != request.variant:
        raise ArgumentError(
            "--resume",
            str(request.resume),
            f"it is a checkpoint of {stored.meta['variant']}, and --variant says {request.variant}",
        )
    return stored


def _cut(request: Request, stored: Checkpoint, world: ProcessGroup) -> Request:
    """`request` with the accumulation that keeps the cut of the batches on other ranks than the checkpoint's."""
    from fastgan.training.distributed.rank_consistency import accumulation_for
    from fastgan.training.factory import plan

    schedule = request.config.schedule
    before = stored.meta["world_size"]
    if request.accumulation or before == world.size:
        return request
    resolutions = [stage.resolution for stage in plan(request.config)]
    parts = before * stored.meta.get("accumulation", schedule.accumulation)
    found = accumulation_for(parts, world.size, schedule, resolutions)
    if found is None:
        return request  # which is refused below, with the batches that may be
    if world.main:
        print(
            f"{world.size} ranks where there were {before}: --accumulation {found} keeps the batch as it was",
            flush=True,
        )
    return dataclasses.replace(request, config=replace(request.config, schedule={"accumulation": found}))


def _train(request: Request, world: ProcessGroup, began: float, held: ExitStack, patience: float) -> int:
    """What each rank does once it has found the others; `held` and `patience` as in `_run_directory`."""
    from fastgan.training.distributed.rank_consistency import same, settings
    from fastgan.training.factory import check_stages, ends_early
    from fastgan.training.trainer import NonFiniteError, Trainer

    if request.config.system.sync_bn and world.device.type != "cuda":
        raise ArgumentError("--sync-bn", True, "it needs GPUs; it may be left out on a CPU")
    same(world, settings(request.config))
    run = _run_directory(request, world, held, patience)
    stored = _stored(request, run)
    same(world, {"the checkpoint to go on from": None if stored is None else (str(stored.path), stored.meta["files"])})
    if stored is not None:
        request = _cut(request, stored, world)
    config = request.config
    check_stages(config, world.size)
    source = _open_source(config, world)
    if world.heartbeat is not None and stored is not None:
        world.heartbeat.run, world.heartbeat.last_good = run, stored.path
    trainer = Trainer(config, request.variant, world, source, run, stored)
    trainer.run_path = run = _create(run, request, world, held)
    if world.heartbeat is not None:
        world.heartbeat.run = run
    if world.main:
        print(f"{trainer.pipeline.describe()}", flush=True)
        print(
            f"engine {world.engine} ({world.reason}), {world.size} x {world.device.type}, run {run}"
            + (f", going on at {trainer.images / 1000:g} kimg" if stored else ""),
            flush=True,
        )
        warning = ends_early(config)
        if warning is not None:
            print(warning, flush=True)
        if request.resume is not None and stored is None:
            print(f"{run} has no checkpoint to go on from: it begins at the beginning", flush=True)
    try:
        stopped = trainer.run()
    except NonFiniteError as error:  # raised by all ranks together
        if world.main:
            print(f"fastgan: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        from fastgan import checkpoint

        good = checkpoint.existing(run)[-1:]
        on = f"the last checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        raise ArgumentError("--out", str(run), f"it could not be written ({error}); {on}") from None
    if world.main:
        quoted = shlex.quote(str(run))
        seen, took = f"{trainer.images / 1000:g} kimg", f"{(time.monotonic() - began) / 60:.1f} minutes"
        if stopped:
            name = signal.Signals(stopped).name
            print(f"stopped by {name} at {seen} after {took}; go on with: fastgan train --resume {quoted}", flush=True)
        else:
            samples = run / "samples"
            print(f"done: {seen} in {took}; samples in {samples}, more with: fastgan sample {quoted}", flush=True)
    return 0


def _has_checkpoint(resume: Path) -> bool:
    """Whether there is anything to read: a run stopped before its first checkpoint starts again from its beginning."""
    from fastgan import checkpoint

    return (
        (resume / "checkpoint.json").is_file()
        or bool(checkpoint.existing(resume))
        or not (resume / "config.yaml").is_file()
    )
