"""Say how good a run's images are: `fastgan evaluate RUN`, on one process or on every rank of torchrun."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastgan.cli.main import check_device, command
from fastgan.config import Config, merge, read_yaml
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.data import Source
    from fastgan.evaluation.features import Extractor


@dataclass(frozen=True)
class Evaluate:
    """Compare a trained generator's images with real ones."""

    run: Annotated[str, tyro.conf.Positional]
    """A run directory (its newest checkpoint), or one checkpoint folder."""
    data: str | None = None
    """Real images, as for fastgan train; None: those of the run."""
    metrics: str | None = None
    """Some of fid,kid,is,prdc,swd,msssim,modes, separated by commas; None: all that mean something here."""
    n: Annotated[int, tyro.conf.arg(aliases=["--images"])] = 50_000
    """Generated images. After torchrun, which takes --n for its own, --images."""
    features: str | None = None
    """digits, inception-v3-compat, vgg16, dinov2-vit-s-14, -b-14 or -l-14; None: digits for digits, else Inception."""
    feature_weights: str | None = None
    """File with the weights of --features; None: torch's cache of downloads, or the network."""
    seed: int = 0
    """Of the generated images, and of every random choice of a metric."""
    device: str = "auto"
    """auto, cpu or cuda."""


def _settings(run: Path, flag: str) -> Config:
    values = read_yaml(run / "config.yaml", flag)
    for key in ("variant", "preset"):
        values.pop(key, None)
    return merge(Config(), values, str(run / "config.yaml"))


def _run_of(path: str) -> Path:
    for run in (Path(path), Path(path).resolve().parent.parent):
        if os.path.isfile(run / "config.yaml"):  # False too where nobody may look
            return run
    raise ArgumentError("RUN", path, "must be a run directory, or a checkpoint in one")


def _source(asked: Evaluate, config: Config, networks: dict[str, Any]) -> Source:
    """The real images at the generator's size and channels."""
    from fastgan.data import open_source

    spec = asked.data or config.data.data
    channels, resolution = networks["channels"], networks["resolution"]
    try:
        source = open_source(spec, config.schedule.resolution, channels, config.run.seed)
        source.require_resolution(resolution)
    except ArgumentError as error:
        if error.argument == "--channels":
            mode = "1 channel" if channels == 1 else f"{channels} channels"
            raise ArgumentError("--data", spec, f"the run's images have {mode} ({error})") from None
        if error.argument == "--resolution":
            raise ArgumentError("--data", spec, f"the run's images have {resolution} px ({error})") from None
        raise
    if networks["num_classes"] and source.num_classes not in (0, networks["num_classes"]):
        raise ArgumentError("--data", spec, f"the run has {networks['num_classes']} classes, not {source.num_classes}")
    return source


def _table(line: dict[str, Any]) -> str:
    """The numbers with the names that their features allow."""
    m, used, features = line["metrics"], line["images"], line["features"]
    inception = features == "inception-v3-compat"
    of = "" if inception else f" ({features} features)"
    rows = []

    def row(name: str, value: str, note: str = "") -> None:
        rows.append((name, value, note))

    if "frechet_distance" in m:
        row("FID" if inception else f"Frechet distance{of}", f"{m['frechet_distance']:.4g}", "lower is better")
    if "kernel_distance" in m:
        spread = f"± {m['kernel_distance_std']:.2g} over subsets"
        row("KID" if inception else f"kernel distance{of}", f"{m['kernel_distance']:.4g}", spread)
    if "class_score" in m:
        name = "inception score" if inception else f"class score{of}"
        row(name, f"{m['class_score']:.4g}", f"± {m['class_score_std']:.2g} over tenths; higher is better")
    if "precision" in m:
        note = f"{used['neighbors']:,} images of each"
        row(f"precision{of}", f"{m['precision']:.4f}", f"k = 3, {note}")
        row(f"recall{of}", f"{m['recall']:.4f}", f"k = 3, {note}")
        row(f"density{of}", f"{m['density']:.4f}", f"k = 5, {note}; 1 is the real images'")
        row(f"coverage{of}", f"{m['coverage']:.4f}", f"k = 5, {note}")
    if "swd" in m:
        side: int = line["resolution"]
        levels: list[str] = []
        while f"swd_level{len(levels)}" in m:
            levels.append(f"{1000 * m[f'swd_level{len(levels)}']:.2f} at {side >> len(levels)} px")
        note = f"{', '.join(levels)}; {used['swd']:,} images of each"
        row("sliced Wasserstein x 10^3", f"{1000 * m['swd']:.2f}", note)
    if "ms_ssim" in m:
        row("MS-SSIM of pairs", f"{m['ms_ssim']:.4f}", f"real images: {m['ms_ssim_real']:.4f}")
    if "modes" in m:
        row("modes", str(m["modes"]), f"of {m['modes_of']:,}; {100 * m['confident']:.1f}% of images are confident")
        row("KL of the modes", f"{m['kl']:.4f}", "nats; generated from real")
    wide = [max(len(r[i]) for r in rows) for i in range(2)]
    return "\n".join(f"  {name:{wide[0]}}  {value:>{wide[1]}}  {note}" for name, value, note in rows)


def _check(asked: Evaluate) -> list[str] | None:
    from fastgan.evaluation.measure import METRICS

    if asked.n < 1:
        raise ArgumentError("--n", asked.n, "must be at least 1")
    if not 0 <= asked.seed < 2**32:
        raise ArgumentError("--seed", asked.seed, f"must be 0 to {2**32 - 1}, as torch-fidelity's may")
    check_device(asked.device, "auto", "cpu", "cuda")
    if asked.metrics is None:
        return None
    names = [name.strip() for name in asked.metrics.split(",") if name.strip()]
    for name in names or [asked.metrics]:
        if name not in METRICS:
            raise ArgumentError("--metrics", name, f"must be {', '.join(METRICS)}, separated by commas")
    return names


def _partial(
    run: Path,
    asked: Evaluate,
    checkpoint: dict[str, Any],
    source: Source,
    extractor: Extractor | None,
    metrics: list[str],
) -> Path:
    """Where an interrupted evaluation is stored: a name that stands for all that its sums depend on."""
    of = extractor and extractor.fingerprint
    key = [checkpoint["files"], asked.seed, asked.n, source.fingerprint, len(source), of, metrics]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return run / f".evaluation-{digest}"


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(Evaluate, args=argv, prog="fastgan evaluate")
    names = _check(asked)
    run = _run_of(asked.run)
    config = _settings(run, "RUN")
    from fastgan.evaluation.collect import discard
    from fastgan.evaluation.features import canonical, open_extractor
    from fastgan.evaluation.measure import Evaluation, choose, default_extractor, needs_features
    from fastgan.generator import load
    from fastgan.training import evaluator
    from fastgan.training.distributed import process_group as processes
    from fastgan.utils.system import cache_folder

    if asked.features is not None:
        canonical(asked.features)
    world = processes.join(asked.device)
    try:
        trained = load(asked.run, str(world.device))
        if "files" not in trained.meta:  # an exported file, which does not say of which run
            raise ArgumentError("RUN", asked.run, "must be a run directory, or a checkpoint in one")
        networks = trained.meta["networks"]
        source = _source(asked, config, networks)
        extractor = None
        if needs_features(names):
            extractor = open_extractor(
                asked.features or default_extractor(source), source.channels, world.device, asked.feature_weights
            )
        metrics = choose(names, extractor, source, networks["resolution"])
        fault = evaluator.unwritable(run)
        partial = None if fault else _partial(run, asked, trained.meta, source, extractor, metrics)
        if world.main and fault:
            print(f"warning: {run} cannot be written ({fault}): the numbers are printed only", file=sys.stderr)
        if world.main:
            reach = "none" if extractor is None else f"{extractor.name}, images reach it {extractor.resize}"
            print(
                f"{trained.meta['variant']} at {trained.meta['images'] / 1000:g} kimg, {asked.n:,} images of "
                f"{networks['resolution']} px beside {len(source):,} real ones of {source.name}; features: {reach}",
                flush=True,
            )
        warnings: list[str] = []

        def warn(text: str) -> None:
            warnings.append(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

        evaluation = Evaluation(
            metrics, extractor, asked.n, asked.seed, cache_folder("evaluation"), partial, progress=True
        )
        draw = evaluator.drawer(trained.module, networks, source, asked.seed)
        found = evaluation(draw, source, networks["resolution"], warn)
        if found is not None:
            line = evaluator.record(evaluation, found, trained.meta, source, warnings)
            print(_table(line), flush=True)  # first: what took an hour to compute must not go with a full disk
            try:
                path = evaluator.append(run, line)
            except OSError as error:
                print(json.dumps(line), flush=True)
                may_be = f"must be a run that can be written, for its record ({error.strerror}); the line is above"
                raise ArgumentError("RUN", str(run), may_be) from None
            print(f"added to {path}")
        discard(partial)
        return 0
    except KeyboardInterrupt:
        if any(run.glob(".evaluation-*")):
            print("what was done is kept; the same command goes on", file=sys.stderr, flush=True)
        raise
    finally:
        processes.stop()
