"""Shared by the long studies: a cache of results by (task, arm, seed, budget), training runs, command line, tables."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fastgan import checkpoint
from fastgan.config.variants import VARIANTS
from fastgan.utils.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
# Settings by section, as arguments of `config.replace`.
Changes = dict[str, dict[str, Any]]
# Sizes for which all generators have the same number of parameters within 10 percent: 100,000 at 16 px and three
# channels, 165,000 at 32 px and one channel.
NETWORKS: dict[int, dict[str, dict[str, Any]]] = {
    16: {
        "mlp": {"width": 100},
        "dcgan": {"width": 32, "max_width": 64},
        "sagan": {"width": 16, "max_width": 64},
        "pggan": {"fmap_base": 256, "fmap_max": 41},
        "r3gan": {"width": 16, "max_width": 56},
    },
    32: {
        "mlp": {"width": 134},
        "dcgan": {"width": 32, "max_width": 64},
        "sagan": {"width": 16, "max_width": 59},
        "pggan": {"fmap_base": 256, "fmap_max": 53},
        "r3gan": {"width": 24, "max_width": 48},
    },
}
# The digits presets of dcgan and lsgan add R1 and drop the discriminator's batch norm. These settings undo that, with
# the learning rates that work best without R1.
_AS_PUBLISHED: Changes = {
    "networks": {"norm_d": "batch"},
    "objective": {"regularizer": "none"},
    "optimizer": {"lr_g": 5e-4, "lr_d": 5e-5, "beta1": 0.5, "beta2": 0.999, "lr_decay": 0.0},
}
_CONSTANT: Changes = {"optimizer": {"lr_decay": 0.0}}
# The arms of a study: variant and changes to its digits preset. All have constant learning rates.
ARMS: dict[str, tuple[str, Changes]] = {
    "gan": ("gan", {}),
    "dcgan": ("dcgan", _AS_PUBLISHED),
    "dcgan-r1": ("dcgan", {}),
    "lsgan": ("lsgan", _AS_PUBLISHED),
    "lsgan-r1": ("lsgan", _CONSTANT),
    "wgan": ("wgan", {}),
    "wgan-gp": ("wgan-gp", {}),
    "wgan-div": ("wgan-div", {}),
    "sagan": ("sagan", {}),
    "pggan": ("pggan", {}),
    "r3gan": ("r3gan", {}),
}


def merge_changes(*changes: Changes) -> Changes:
    """Merge changes; later ones override earlier ones."""
    merged: Changes = {}
    for change in changes:
        for section, values in change.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged


def changes_of(arm: str, resolution: int, *more: Changes) -> Changes:
    """All changes of an arm to its variant's digits preset."""
    variant, changes = ARMS[arm]
    size = NETWORKS[resolution][VARIANTS[variant].digits.networks.model]
    return merge_changes({"networks": size, "schedule": {"resolution": resolution}}, changes, *more)


def as_flags(changes: Changes) -> list[str]:
    """Changes as flags of `fastgan train`."""
    values = [pair for section in changes.values() for pair in section.items()]
    return [word for key, value in values for word in (f"--{key.replace('_', '-')}", str(value))]


class Interrupted(Exception):
    """The user interrupted the study."""


class ResultCache:
    """Results by name, in a JSON file that is rewritten after each.

    Attributes:
        file: the JSON file.
        results: name -> values.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}

    def store(self, name: str, values: dict[str, Any]) -> None:
        # Another process may have stored results meanwhile.
        if self.file.is_file():
            self.results = json.loads(self.file.read_text())
        self.results[name] = values
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, (json.dumps(self.results, indent=1, sort_keys=True) + "\n").encode())

    def compute(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Compute and store a result.

        Returns:
            The result of `work`, or None if it is stored already or if training failed, which is reported on stderr.

        Raises:
            Interrupted: Ctrl-C, here or in training.
        """
        if name in self.results:
            return None
        try:
            values = work()
        except subprocess.CalledProcessError as error:
            log = error.cmd[-1] + ".log"
            print(f"{name}: training failed with exit code {error.returncode}; see {log}", file=sys.stderr, flush=True)
            return None
        except KeyboardInterrupt:
            print(f"interrupted in {name}; the same command resumes", file=sys.stderr, flush=True)
            raise Interrupted from None
        self.store(name, values)
        return values

    def compute_all(
        self,
        cells: Iterable[tuple[str, Callable[[], dict[str, Any]]]],
        describe: Callable[[dict[str, Any]], str] = lambda _: "done",
    ) -> None:
        """Compute the results that are not stored yet, in this order, with a line about each, until Ctrl-C."""
        with contextlib.suppress(Interrupted):
            for name, work in cells:
                values = self.compute(name, work)
                if values is not None:
                    print(f"{name}: {describe(values)}", flush=True)

    def all_seeds(self, task: str, arm: str, kimg: float) -> list[dict[str, Any]]:
        """The stored results of all seeds."""
        start, end = f"{task}/{arm}/seed", f"/{kimg:g}kimg"
        return [self.results[name] for name in sorted(self.results) if name.startswith(start) and name.endswith(end)]


def result_name(task: str, arm: str, seed: int, kimg: float) -> str:
    """The name of a result in the cache."""
    return f"{task}/{arm}/seed{seed}/{kimg:g}kimg"


def argument_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The flags of all studies. `name` is that of the result file and of the folder of training runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    results = ROOT / "benchmarks" / "results" / f"{name}.json"
    parser.add_argument("--results", "--cells", type=Path, default=results, help="JSON file of finished results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / name, help="folder of training runs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--table", action="store_true", help="only print the table of finished results")
    return parser


def open_cache(args: argparse.Namespace) -> tuple[ResultCache, list[str]]:
    """Apply --threads. Returns the cache, and the flags to pass on to `fastgan train`."""
    torch.set_flush_denormal(True)
    if args.threads is None:
        return ResultCache(args.results), []
    torch.set_num_threads(args.threads)
    return ResultCache(args.results), ["--threads", str(args.threads)]


def train_run(arm: str, run: Path, kimg: float, changes: Changes, flags: Sequence[str]) -> None:
    """Train to `kimg` in a new process, resuming an interrupted run. The output goes to RUN.log.

    Raises:
        subprocess.CalledProcessError: Training failed.
        KeyboardInterrupt: Training was stopped by a signal, and saved a checkpoint.
    """
    train_command(
        run, ["--variant", ARMS[arm][0], "--preset", "digits", *as_flags(changes), "--kimg", f"{kimg:g}", *flags]
    )


def train_command(run: Path, flags: Sequence[str]) -> None:
    """Train with these flags of `fastgan train`, or resume; everything else as `train_run`."""
    command = [sys.executable, str(ROOT / "fastgan" / "train.py")]
    begun = (run / "config.yaml").is_file()
    command += [*([] if checkpoint.existing(run) else flags), "--resume" if begun else "--out", str(run)]
    log = run.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
    # Training that a signal stopped saves a checkpoint and exits with 0.
    kimg = yaml.safe_load((run / "config.yaml").read_text())["schedule"]["kimg"]
    if float(checkpoint.existing(run)[-1].name.removeprefix("kimg-")) < kimg:
        raise KeyboardInterrupt


def diverged(run: Path) -> str | None:
    """Why a run of `train_run` stopped, if a loss or gradient was not finite or ran away."""
    log = run.with_name(f"{run.name}.log")
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if "was not finite" in line or "and stays for" in line), None)


def training_seconds(run: Path) -> float:
    """Seconds of training by the rows of metrics.jsonl; samples and checkpoints are not counted."""
    seconds, before = 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += (row["images"] - before) / row["images_per_second"]
        before = row["images"]
    return seconds


def mean_and_range(values: Sequence[float], form: str) -> str:
    """The mean of values, with their range if there are several: "mean (min to max)"."""
    mean = sum(values) / len(values)
    text = format(mean, form)
    return text if len(values) < 2 else f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
