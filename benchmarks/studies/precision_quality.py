"""Quality in float32 and in bfloat16 (or another precision): the digits presets, several seeds, equal images.

    python -m benchmarks.studies.precision_quality --threads 1 [--variants wgan-gp pggan] [--seeds 3] [--share 0.25]
    python -m benchmarks.studies.precision_quality --speed --threads 1
    python -m benchmarks.studies.precision_quality --data mnist:ROOT --features inception

Every run is the digits preset of its variant, changed in its precision alone. --share shortens all runs alike: 0.25 is
a quarter of each preset's images. For each variant, seed and precision: Frechet distance, precision and recall of
--images images of the EMA generator, the distance at five points of the training, and whether the run diverged.

The last column of the table is the rule for `--precision auto`: "yes" where, with at least three seeds of each, no run
of the lower precision diverged and its ranges of distance, precision and recall overlap those of fp32 or are better.
--speed trains nothing: it times the steps of both precisions in turns, on an idle machine. With these times the table
has the distance at equal time as well: fp32's at the images that it sees in the seconds of the other's whole run.

Finished cells are stored in --results, each when it is done; an interrupted command resumes. --table prints the table.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastgan
from benchmarks.studies.result_cache import (
    ARMS,
    ResultCache,
    argument_parser,
    diverged,
    markdown_table,
    mean_and_range,
    open_cache,
    result_name,
    train_run,
)
from fastgan import checkpoint
from fastgan.config import batch_at, replace
from fastgan.config.growth import stages_of
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.evaluation.of_generator import drawer
from fastgan.training.step_measurement import Bench
from fastgan.utils.system import cache_folder

CHEAPEST_FIRST = ["wgan-gp", "pggan", "dcgan", "lsgan", "gan", "wgan", "wgan-div", "sagan"]
POINTS = 5
CURVE_IMAGES = 2000
SEEDS_FOR_A_VERDICT = 3
# Metric -> whether more is better.
METRICS = {"frechet_distance": False, "precision": True, "recall": True}
FORMS = {"frechet_distance": ".1f", "precision": ".2f", "recall": ".2f"}


def kimg_of(variant: str, share: float) -> float:
    """The length of a variant's runs."""
    return round(share * VARIANTS[variant].config("digits").schedule.kimg, 3)


def train_and_measure(
    variant: str, precision: str, seed: int, kimg: float, args: Any, flags: Sequence[str]
) -> dict[str, Any]:
    """Train a variant, or resume it, and measure it. Returns the cell to store."""
    run = args.runs / f"{variant}-{precision}-seed{seed}-{kimg:g}kimg"
    own = f"--data {args.data} --seed {seed} --keep 1000 --checkpoint-kimg {kimg / POINTS:g} --sample-kimg {kimg:g}"
    try:
        train_run(variant, run, kimg, {"system": {"precision": precision}}, [*own.split(), *flags])
    except subprocess.CalledProcessError:
        reason = diverged(run)
        if reason is None:
            raise
        return {"kimg": kimg, "diverged": reason}
    source = open_source(args.data, VARIANTS[variant].config("digits").schedule.resolution)
    extractor = open_extractor(args.features, source.channels)

    def evaluate(path: Path, metrics: list[str], n: int) -> dict[str, float]:
        trained = fastgan.load(path)
        draw = drawer(trained.module, trained.meta["networks"], source, seed)
        evaluation = Evaluation(metrics, extractor, n, seed, cache_folder("evaluation"))
        result = evaluation(draw, source, source.resolution, print)
        assert result is not None
        return result["metrics"]

    final = evaluate(run, ["fid", "prdc"], args.images)
    curve = []
    for path in checkpoint.existing(run)[:-1]:
        meta = checkpoint.read(path, "RUN").meta
        if meta["resolution"] == source.resolution:  # before, the images are smaller than the real ones
            distance = evaluate(path, ["fid"], CURVE_IMAGES)["frechet_distance"]
            curve.append({"kimg": meta["images"] / 1000, "frechet_distance": distance})
    curve.append({"kimg": kimg, "frechet_distance": final["frechet_distance"]})
    return {"kimg": kimg, "torch": torch.__version__, **{name: final[name] for name in METRICS}, "curve": curve}


def seconds_of_run(variant: str, precision: str, share: float, measure: float) -> float:
    """Seconds of all steps of a run, from the times of its kinds of steps."""
    config = replace(VARIANTS[variant].config("digits"), system={"precision": precision})
    config = replace(config, schedule={"kimg": kimg_of(variant, share)})
    bench, total = Bench(config, torch.device("cpu"), 1, measure), 0.0
    for stage in stages_of(config):
        batch = batch_at(config.schedule, stage.resolution)
        for fading, images in ((True, stage.fade_end - stage.start), (False, stage.end - stage.fade_end)):
            if images > 0:
                timing = bench.time(stage.resolution, batch, fading)
                total += images / batch * (timing.d.seconds + timing.g.seconds / config.optimizer.n_critic)
    return total


def cells(cache: ResultCache, data: str, variant: str, precision: str, kimg: float) -> list[dict[str, Any]]:
    return cache.all_seeds(data, f"{variant}/{precision}", kimg)


def overlaps(low: Sequence[float], full: Sequence[float], more_is_better: bool) -> bool:
    """Whether the range of `low` overlaps that of `full`, or lies on its better side."""
    return max(low) >= min(full) if more_is_better else min(low) <= max(full)


def verdict(full: list[dict[str, Any]], low: list[dict[str, Any]]) -> str:
    """Whether the lower precision may be the default: "yes", the metrics that forbid it, or "-": too few seeds."""
    if min(len(full), len(low)) < SEEDS_FOR_A_VERDICT:
        return "-"
    if any("diverged" in cell for cell in low):
        return "no: diverged"
    whole = [cell for cell in full if "diverged" not in cell]
    worse = [
        name
        for name, more in METRICS.items()
        if whole and not overlaps([cell[name] for cell in low], [cell[name] for cell in whole], more)
    ]
    return f"no: {', '.join(worse).replace('_', ' ')}" if worse else "yes"


def at_equal_time(full: list[dict[str, Any]], kimg: float, ratio: float) -> list[float]:
    """Distances of float32 runs at kimg / ratio, where `ratio` is how much faster the other precision's steps are."""
    curves = [cell["curve"] for cell in full if len(cell.get("curve", [])) > 1]
    return [
        float(np.interp(kimg / ratio, [p["kimg"] for p in curve], [p["frechet_distance"] for p in curve]))
        for curve in curves
    ]


def report(cache: ResultCache, args: Any) -> str:
    """The table of finished cells."""
    rows = []
    for variant in args.variants:
        kimg = kimg_of(variant, args.share)
        of = {name: cells(cache, args.data, variant, name, kimg) for name in ("fp32", args.precision)}
        speed = cache.results.get(f"speed/{variant}", {})
        for precision, found in of.items():
            whole = [cell for cell in found if "diverged" not in cell]
            values = [mean_and_range([c[name] for c in whole], FORMS[name]) if whole else "-" for name in METRICS]
            lower, ratio = precision != "fp32", "-"
            equal_time = "-"
            if lower and {"fp32", precision} <= speed.keys():
                faster = speed["fp32"] / speed[precision]
                ratio, distances = f"{faster:.2f}x", at_equal_time(of["fp32"], kimg, faster)
                equal_time = mean_and_range(distances, ".1f") if distances else "-"
            row = [f"`{variant}`", precision, f"{kimg:g}", str(len(found)), str(len(found) - len(whole)), *values]
            rows.append([*row, ratio, equal_time, verdict(of["fp32"], found) if lower else ""])
    head = "variant|precision|kimg|seeds|diverged|Frechet distance|precision|recall|speed beside fp32"
    return markdown_table([*head.split("|"), "fp32's distance at equal time", f"{args.precision} may be auto"], rows)


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__, "precision")
    parser.set_defaults(variants=CHEAPEST_FIRST)
    parser.add_argument("--precision", default="bf16", help="what is compared with fp32")
    parser.add_argument("--share", type=float, default=1.0, help="share of each preset's images")
    parser.add_argument("--data", default="digits", help="as for fastgan train")
    parser.add_argument("--features", default="digits", help="as for fastgan evaluate")
    parser.add_argument("--images", type=int, default=5000, help="generated images of an evaluation")
    parser.add_argument("--speed", action="store_true", help="time steps only, without training")
    parser.add_argument("--measure-seconds", type=float, default=3.0, help="duration of each measurement of --speed")
    args = parser.parse_args(argv)
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"--variants must be of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown & set(ARMS)))}")
    cache, flags = open_cache(args)
    for variant in args.variants if args.speed else []:
        times = {
            name: seconds_of_run(variant, name, args.share, args.measure_seconds) for name in ("fp32", args.precision)
        }
        cache.store(f"speed/{variant}", {**times, "threads": torch.get_num_threads()})
        print(f"speed/{variant}: {times}", flush=True)
    order = [(v, seed, p) for v in args.variants for seed in range(args.seeds) for p in ("fp32", args.precision)]
    cells = []
    for variant, seed, precision in [] if args.table or args.speed else order:
        kimg = kimg_of(variant, args.share)
        work = functools.partial(train_and_measure, variant, precision, seed, kimg, args, flags)
        cells.append((result_name(args.data, f"{variant}/{precision}", seed, kimg), work))
    cache.compute_all(cells)
    print(report(cache, args))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
