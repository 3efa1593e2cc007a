"""Sets of real pictures under the preset `auto`: variants, seeds, augmentation, each for a time on one core.

    python -m benchmarks.studies.pictures [GROUP ...] --fashion-mnist FOLDER --threads 1 [--seeds 3] [--variants ...]

Groups: `fashion-mnist`, every variant for 20 minutes; `avatars`, four variants at 64 px for 90 minutes; `few`, 300 and
1,000 avatars with and without augmentation, 60 minutes, the first of --variants. Everything that is not named here is
decided by `auto`; --set FLAG VALUE changes a group's runs, under a name of its own (--label).

Each cell has the distance and the shares of `fastgan evaluate` with 1,000 images of each side, and with 5,000; the
kimg and minutes of its run; or why the run stopped. Finished cells are stored in --results, each when it is done; the
same command resumes. --table prints them.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import fastgan
from benchmarks.studies.result_cache import (
    ResultCache,
    argument_parser,
    diverged,
    markdown_table,
    mean_and_range,
    open_cache,
    train_command,
    training_seconds,
)
from fastgan.config.variants import VARIANTS
from fastgan.data import open_source
from fastgan.evaluation import evaluate

IMAGES = (1000, 5000)
SHOWN = {"frechet_distance": ".1f", "precision": ".2f", "recall": ".2f", "coverage": ".2f", "memorized": ".2f"}


@dataclass(frozen=True)
class Group:
    """Runs of one length.

    Attributes:
        minutes: of training, as `--hours` counts them.
        variants: in this order.
        flags: of every run.
        arms: name -> flags that distinguish runs of one variant.
    """

    minutes: float
    variants: tuple[str, ...]
    flags: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]


def groups(fashion_mnist: str) -> dict[str, Group]:
    one: Mapping[str, tuple[str, ...]] = {"": ()}
    few = {
        f"{n}-{augment}": ("--data", f"avatars?n={n}", "--augment", augment)
        for n in (300, 1000)
        for augment in ("none", "ada")
    }
    first = ("wgan-gp", "r3gan", "pggan")
    every = (*first, *(name for name in VARIANTS if name not in first))
    return {
        "fashion-mnist": Group(20, every, ("--data", f"fashion-mnist:{fashion_mnist}", "--resolution", "32"), one),
        "avatars": Group(90, ("pggan", "r3gan", "sagan", "wgan-gp"), ("--data", "avatars", "--resolution", "64"), one),
        "few": Group(60, ("pggan",), ("--resolution", "64"), few),
    }


def train_and_measure(run: Path, flags: Sequence[str], seed: int) -> dict[str, Any]:
    """Train, or resume, a run, and compare it with its data. Returns the cell to store."""
    try:
        train_command(run, flags)
    except subprocess.CalledProcessError:
        reason = diverged(run)
        if reason is None:
            raise
        return {"diverged": reason}
    trained = fastgan.load(run)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    cell: dict[str, Any] = {"torch": torch.__version__, "kimg": last["images"] / 1000, "form": last["form"]}
    cell["minutes"] = training_seconds(run) / 60
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]["data"]
    for n in IMAGES:
        real = min(n, len(open_source(data, trained.meta["resolution"])))
        cell[str(n)] = evaluate(trained, data, n=n, real=real, metrics=["fid", "prdc"], seed=seed)
    return cell


def report(cache: ResultCache, names: Sequence[str]) -> str:
    """The table of finished cells, seeds together."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for name, cell in sorted(cache.results.items()):
        arm, _, _ = name.rpartition("/seed")
        if name.split("/")[0] in names:
            arms.setdefault(arm, []).append(cell)
    rows = []
    for arm, found in arms.items():
        whole = [cell for cell in found if "diverged" not in cell]

        columns = [(".0f", [cell["kimg"] for cell in whole]), (".0f", [cell["minutes"] for cell in whole])]
        for n in IMAGES:
            shown = SHOWN if n == IMAGES[-1] else {"frechet_distance": ".1f"}
            columns += [(form, [cell[str(n)][key] for cell in whole]) for key, form in shown.items()]
        values = [mean_and_range(numbers, form) if numbers else "-" for form, numbers in columns]
        rows.append([arm, str(len(found)), str(len(found) - len(whole)), *values])
    head = ["cell", "seeds", "diverged", "kimg", "minutes", "distance, 1,000", "distance, 5,000"]
    return markdown_table([*head, *(name.replace("_", " ") for name in list(SHOWN)[1:])], rows)


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__, "pictures")
    parser.set_defaults(variants=None)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="default: all")
    parser.add_argument("--fashion-mnist", default="", metavar="FOLDER", help="its files; see picture_sets")
    pair = ("FLAG", "VALUE")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=pair, help="as --set lr-g 0.001")
    parser.add_argument("--label", default="", help="name of what --set changed")
    args = parser.parse_args(argv)
    known = groups(args.fashion_mnist)
    if unknown := set(args.groups) - set(known):
        parser.error(f"GROUP must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if bool(args.set) != bool(args.label):
        parser.error("--set and --label go together")
    chosen = args.groups or list(known)
    if "fashion-mnist" in chosen and not args.table and not args.fashion_mnist:
        parser.error("--fashion-mnist must name the folder of the set")
    cache, threads = open_cache(args)
    changes = [word for flag, value in args.set for word in (f"--{flag}", value)]
    cells = []
    for seed in range(args.seeds):
        for group in chosen:
            setting = known[group]
            for variant in args.variants or setting.variants:
                for arm, own in setting.arms.items():
                    name = "/".join(part for part in (group, variant, arm, args.label, f"seed{seed}") if part)
                    flags = ["--preset", "auto", "--variant", variant, "--hours", f"{setting.minutes / 60:.4f}"]
                    flags += [*setting.flags, *own, *changes, "--seed", str(seed), *threads]
                    run = args.runs / name.replace("/", "-")
                    cells.append((name, functools.partial(train_and_measure, run, flags, seed)))
    cache.compute_all([] if args.table else cells, lambda cell: json.dumps(cell.get("1000", cell)))
    print(report(cache, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
