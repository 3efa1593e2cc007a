"""Turns flags and files into the configuration of a run: preset, then files, then flags."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro

from fastgan.config import Config, replace, to_dict, validate, without_effect
from fastgan.config.auto import placeholder
from fastgan.config.files import merge, read_yaml
from fastgan.config.variants import VARIANTS, Preset
from fastgan.errors import ArgumentError
from fastgan.training import run_directory
from fastgan.training.resilience import supervisor

DEFAULT_VARIANT = "pggan"
_NAMES = {"variant": f"must be one of {', '.join(VARIANTS)}", "preset": "must be auto, paper, paper-8-gpus or digits"}
_PRESET_OF_DATA = {"digits": "digits", "stacked-digits": "digits", "synthetic": "paper"}


@dataclasses.dataclass(frozen=True)
class RunFlags(Config):
    """Flags that name a run."""

    variant: str = DEFAULT_VARIANT
    """gan, dcgan, lsgan, wgan, wgan-gp, wgan-div, sagan, pggan or r3gan; where none is named, auto chooses."""
    preset: str | None = None
    """auto (chosen by pictures, machine and time), paper (the published recipe; of pggan paper-8-gpus too) or digits
    (small); None: digits for digits and stacked-digits, paper for synthetic images, auto for all others."""
    hours: float | None = None
    """Time of a new run, from which --kimg is chosen by steps measured here; None: --kimg, and with auto 8 hours."""
    config: str | None = None
    """YAML file that replaces values of the preset; flags replace its own. A run's config.yaml is one."""
    resume: str | None = None
    """Run or checkpoint folder to resume; auto: the run in --out, or the run of the variant trained last, if any."""


Flags = TypeVar("Flags", bound=RunFlags)


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """A parsed command line.

    Attributes:
        config: complete and valid.
        variant, preset: what it started from.
        resume: run or checkpoint folder to resume, if any.
        flags: all flags, those of the command among them.
        sets_accumulation: whether --accumulation was given; else a resumed run keeps the cut of its batches.
        notes: lines about flags that have no effect.
        typed: names of the fields whose values flags give.
        given: those whose values flags, files or --init-from give.
        names_variant: whether they name the variant too.
    """

    config: Config
    variant: str
    preset: str
    resume: Path | None
    flags: RunFlags
    sets_accumulation: bool = False
    notes: tuple[str, ...] = ()
    typed: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    names_variant: bool = True


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The content of a configuration file, and its name for errors."""

    values: dict[str, Any]
    name: str


def _pairs_of(number: type[int] | type[float], words: list[str]) -> dict[int, int] | dict[int, float]:
    if len(words) % 2:
        raise ValueError(f"must be pairs of a resolution and a {'batch' if number is int else 'factor'}")
    return {int(key): number(value) for key, value in zip(words[::2], words[1::2], strict=True)}


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _pairs(info: Any) -> Any:
    """A dict as `RESOLUTION VALUE ...`; of a dict with a default tyro would make a flag for each key."""
    number = {dict[int, int]: int, dict[int, float]: float}.get(info.type)
    if number is None:
        return None
    name = number.__name__.upper()
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[INT {name} [INT {name} ...]]",
        instance_from_str=functools.partial(_pairs_of, number),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(number) for pair in value.items() for number in pair],
    )


def _first_pass(argv: list[str], prog: str) -> argparse.Namespace:
    """The flags that decide the defaults of all others.

    Raises:
        ArgumentError: a path that is not UTF-8, which TensorBoard and config.yaml need.
    """
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    for flag in ("--variant", "--preset", "--config", "--data", "--resume", "--out", "--init-from"):
        parser.add_argument(flag)
    first = parser.parse_known_args(argv)[0]
    for flag in ("out", "resume"):
        path = getattr(first, flag) or ""
        if path.encode(errors="replace").decode() != path:
            raise ArgumentError(f"--{flag}", path, "must be a path in UTF-8")
    return first


def _name(layer: _Layer, key: str) -> str | None:
    """The variant or preset that a file names, if any.

    Raises:
        ArgumentError: it is not a name.
    """
    name = layer.values.get(key)
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"{layer.name}: {key}", name, _NAMES[key])
    return name


def _prepared_resolution(data: object) -> int | None:
    """The highest resolution of a prepared set, which limits the preset's; None for other data."""
    path = Path(os.path.expanduser(str(data).removeprefix("prepared:")))
    if not os.path.isfile(path / "manifest.json"):
        return None
    from fastgan.data.prepared import read_manifest

    return read_manifest(path).resolution


def _stored_run(resume: Path, requested: dict[str, str | None]) -> _Layer:
    """The config.yaml of a run to resume.

    Raises:
        ArgumentError: the command line names another variant or preset.
    """
    run = run_directory.of(str(resume))
    stored = _Layer(read_yaml(run / "config.yaml", "--resume"), str(run / "config.yaml"))
    for key, name in requested.items():
        before = _name(stored, key)
        if name is not None and before is not None and name != before:
            raise ArgumentError(f"--{key}", name, f"must be {before}; the run {run} was started with it")
    if isinstance(stored.values.get("run"), dict):
        stored.values["run"].pop("out", None)  # a run resumes where it is now, moved or not
    return stored


def _layers(first: argparse.Namespace) -> tuple[list[_Layer], Path | None]:
    """Configuration files, the later ones on top, and the run to resume."""
    layers = [_Layer(read_yaml(Path(first.config), "--config"), first.config)] if first.config else []
    names: dict[str, str | None] = {"variant": first.variant, "preset": first.preset}
    for layer in layers:
        names = {key: name or _name(layer, key) for key, name in names.items()}
    resume: Path | None = None
    if first.resume == "auto":
        auto = (names["preset"] or _PRESET_OF_DATA.get(first.data or "digits", "auto")) == "auto"
        resume = run_directory.newest(first.out, names["variant"] or (None if auto else DEFAULT_VARIANT))
    elif first.resume:
        resume = Path(first.resume)
    if resume is not None:
        layers.insert(0, _stored_run(resume, names))
    return layers, resume


def _initial_values(first: argparse.Namespace, layers: list[_Layer]) -> dict[str, Any] | None:
    """The plain values of the run or the export of --init-from, if there is one.

    Raises:
        ArgumentError: there is neither, or it is damaged.
    """
    path = first.init_from
    for layer in layers if path is None else []:
        section = layer.values.get("run")
        path = section.get("init_from", path) if isinstance(section, dict) else path
    if path is None:
        return None
    from fastgan.training.initial_weights import read_meta

    return read_meta(str(path))


def _with_networks(base: Config, initial: dict[str, Any], variant: str) -> Config:
    """`base` with the networks of a checkpoint, and its resolution as the first one.

    Raises:
        ArgumentError: the variant has networks of another kind.
    """
    networks = dict(initial["networks"])
    if networks["model"] != base.networks.model:
        fitting = [name for name, one in VARIANTS.items() if one.paper.networks.model == networks["model"]]
        problem = f"must be {', '.join(fitting)}; the weights of --init-from are those of {networks['model']}"
        raise ArgumentError("--variant", variant, problem)
    resolution, channels = networks.pop("resolution"), networks.pop("channels")
    networks["conditional"] = networks.pop("num_classes") > 0
    schedule = {"resolution": resolution}
    if networks["model"] == "pggan":
        schedule["first_resolution"] = resolution
    return replace(base, networks=networks, schedule=schedule, data={"channels": channels})


def _start(
    first: argparse.Namespace, layers: list[_Layer], initial: dict[str, Any] | None
) -> tuple[str | None, str, str]:
    """Variant (None: not named), preset and data of a command line with its files; removes the first two from them.

    Raises:
        ArgumentError: there is no such variant or preset.
    """
    variant, preset, data = None if initial is None else initial["variant"], None, "digits"
    for layer in layers:
        variant = layer.values.pop("variant", variant)
        preset = layer.values.pop("preset", preset)
        section = layer.values.get("data")
        data = section.get("data", data) if isinstance(section, dict) else data
    variant, preset, data = first.variant or variant, first.preset or preset, first.data or data
    if variant not in (None, *VARIANTS):
        raise ArgumentError("--variant", variant, _NAMES["variant"])
    if preset is None:
        preset = (
            _PRESET_OF_DATA.get(data, "auto") if isinstance(data, str) else "auto"
        )  # data of a file may be anything
    if preset not in ("auto", *get_args(Preset)):
        raise ArgumentError("--preset", preset, _NAMES["preset"])
    return variant, preset, data


def _preset(variant: str, preset: str) -> Config:
    if preset == "auto":
        return placeholder(variant)
    return VARIANTS[variant].config(preset)


def _validate_hours(hours: float | None, given: Collection[str], resume: Path | None) -> None:
    """Refuse a time that is no time, or that something else decides.

    Raises:
        ArgumentError: naming --hours.
    """
    if hours is None:
        return
    if not 0 < hours < 10**5:
        raise ArgumentError("--hours", hours, "must be above 0 and below 100,000")
    if "kimg" in given:
        raise ArgumentError("--hours", hours, "cannot be combined with --kimg: remove one")
    if resume is not None:
        raise ArgumentError("--hours", hours, "the length of a run is fixed when it starts; --kimg changes it")


def parse(argv: list[str], kind: type[Flags], prog: str) -> RunRequest:
    """The run that a command line asks for.

    Args:
        argv: the command line without the command's name.
        kind: the flags of the command.
        prog: the command's name, for --help.

    Raises:
        ArgumentError: a value that cannot be used.
        SystemExit: --help, or a flag that does not exist.
    """
    # DeepSpeed's launcher adds the first, whose environment variable is used instead, and our supervisor the others.
    argv = [flag for flag in argv if not flag.startswith(("--local_rank=", supervisor.HOSTS_FLAG, supervisor.JOB_FLAG))]
    first = _first_pass(argv, prog)
    layers, resume = _layers(first)
    initial = None if resume is not None else _initial_values(first, layers)
    named, preset, data = _start(first, layers, initial)
    variant = named or DEFAULT_VARIANT
    # A value that the stored file of a run lacks is newer than the run. It gets the default, which changes nothing.
    base = _preset(variant, preset) if resume is None else Config()
    largest = _prepared_resolution(data)
    if largest is not None and resume is None:
        base = replace(base, schedule={"resolution": min(base.schedule.resolution, largest)})
    of_files: set[str] = set()
    if initial is not None:
        base = _with_networks(base, initial, variant)
        of_files = {*to_dict(base)["networks"], "resolution", "first_resolution", "channels"}
    for layer in layers:
        of_files.update(*(content for content in layer.values.values() if isinstance(content, dict)))
        schedule = layer.values.get("schedule")
        base = _one_growth_rule(merge(base, layer.values, layer.name), schedule if isinstance(schedule, dict) else ())
    sections = {field.name: getattr(base, field.name) for field in dataclasses.fields(Config)}
    defaults = kind(**sections, variant=variant, preset=first.preset)
    flags = tyro.cli(
        kind, args=argv, default=defaults, prog=prog, config=(tyro.conf.OmitArgPrefixes,), registry=_REGISTRY
    )
    given = {flag.split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for flag in argv if flag[:2] == "--"}
    _validate_hours(flags.hours, given, resume)
    config = Config(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)})
    config = _one_growth_rule(config, given)
    validate(config)
    request = RunRequest(
        config=config,
        variant=variant,
        preset=preset,
        resume=resume,
        flags=flags,
        sets_accumulation="accumulation" in given,
        typed=frozenset(given),
        given=frozenset(given | of_files),
        names_variant=named is not None or "model" in given,
    )
    return with_notes(request)


def with_notes(request: RunRequest) -> RunRequest:
    """`request` with notes about those of its flags that have no effect."""
    notes = tuple(f"note: {line}" for line in without_effect(request.config, request.typed))
    return dataclasses.replace(request, notes=notes)


def _one_growth_rule(config: Config, given: Collection[str]) -> Config:
    """Stages by their lengths or by their share of the run: the one that is `given` replaces the other.

    Raises:
        ArgumentError: both are given.
    """
    s = config.schedule
    lengths = any(key in given and getattr(s, key) is not None for key in ("fade_kimg", "stable_kimg"))
    share = "grown_at" in given and s.grown_at is not None
    if lengths and share:
        raise ArgumentError("--grown-at", s.grown_at, "it is not needed with --fade-kimg or --stable-kimg: remove it")
    if lengths:
        return replace(config, schedule={"grown_at": None})
    return replace(config, schedule={"fade_kimg": None, "stable_kimg": None}) if share else config
