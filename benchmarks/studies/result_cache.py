"""Long comparisons in cells: each is computed once, kept in a JSON file, and a table is made of those that are done."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgan import checkpoint
from fastgan.config.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
# Settings by section, as `config.replace` takes them.
Changes = dict[str, dict[str, Any]]
# Sizes that make the generators equally large within a tenth, whatever the presets': 100,000 parameters at 16 px and
# three channels, 165,000 at 32 px and one.
NETWORKS: dict[int, dict[str, dict[str, Any]]] = {
    16: {
        "mlp": {"width": 100},
        "dcgan": {"width": 32, "max_width": 64},
        "sagan": {"width": 16, "max_width": 64},
        "pggan": {"fmap_base": 256, "fmap_max": 41},
    },
    32: {
        "mlp": {"width": 134},
        "dcgan": {"width": 32, "max_width": 64},
        "sagan": {"width": 16, "max_width": 59},
        "pggan": {"fmap_base": 256, "fmap_max": 53},
    },
}
# The digits presets of dcgan and lsgan hold the discriminator by R1 and leave out its batch norm. As published they
# have neither, and these are the rates that suit them best then.
_AS_PUBLISHED: Changes = {
    "networks": {"norm_d": "batch"},
    "objective": {"regularizer": "none"},
    "optimizer": {"lr_g": 5e-4, "lr_d": 5e-5, "beta1": 0.5, "beta2": 0.999, "lr_decay": 0.0},
}
_CONSTANT: Changes = {"optimizer": {"lr_decay": 0.0}}
# What is compared: a variant's digits preset with some settings changed; all at rates that do not fall.
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
}


def merged(*changes: Changes) -> Changes:
    """All of them; the later ones win."""
    found: Changes = {}
    for change in changes:
        for section, values in change.items():
            found[section] = {**found.get(section, {}), **values}
    return found


def changed(arm: str, resolution: int, *more: Changes) -> Changes:
    """What an arm trains with that its variant's digits preset has not."""
    variant, changes = ARMS[arm]
    size = NETWORKS[resolution][VARIANTS[variant].digits.networks.model]
    return merged({"networks": size, "schedule": {"resolution": resolution}}, changes, *more)


def as_flags(changes: Changes) -> list[str]:
    """The same as flags of fastgan train."""
    values = [pair for section in changes.values() for pair in section.items()]
    return [word for key, value in values for word in (f"--{key.replace('_', '-')}", str(value))]


class Stopped(Exception):
    """The user stopped the comparison."""


class Cells:
    """Finished cells by name, in a file that is replaced whole after each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(self, name: str, values: dict[str, Any]) -> None:
        # Another process may have finished cells of its own meanwhile.
        if self.file.is_file():
            self.done = json.loads(self.file.read_text())
        self.done[name] = values
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".{self.file.name}.part")
        partial.write_text(json.dumps(self.done, indent=1, sort_keys=True) + "\n")
        os.replace(partial, self.file)

    def compute(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `work` finds, kept; None if the cell is done already, or if training in it failed, which is said.

        Raises:
            Stopped: it was interrupted.
        """
        if name in self.done:
            return None
        try:
            values = work()
        except subprocess.CalledProcessError as error:
            said = error.cmd[-1] + ".log"
            print(f"{name}: training failed with exit code {error.returncode}; see {said}", file=sys.stderr, flush=True)
            return None
        except KeyboardInterrupt:
            print(f"stopped in {name}; the same command goes on", file=sys.stderr, flush=True)
            raise Stopped from None
        self.keep(name, values)
        return values

    def of(self, task: str, variant: str, kimg: float) -> list[dict[str, Any]]:
        """The finished cells of all seeds."""
        start, end = f"{task}/{variant}/seed", f"/{kimg:g}kimg"
        return [self.done[name] for name in sorted(self.done) if name.startswith(start) and name.endswith(end)]


def name_of(task: str, variant: str, seed: int, kimg: float) -> str:
    """Name of a cell."""
    return f"{task}/{variant}/seed{seed}/{kimg:g}kimg"


def arguments(description: str | None, file: str) -> argparse.ArgumentParser:
    """The flags that every comparison has; `file` names its cells and the folder of its runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=Path, default=ROOT / "benchmarks" / "results" / f"{file}.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / file, help="where cells are trained")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--table", action="store_true", help="make the table of what is done, and compute nothing")
    return parser


def start(asked: argparse.Namespace) -> tuple[Cells, list[str]]:
    """The cells that are done, and the flags that training in a process of its own needs."""
    torch.set_flush_denormal(True)
    if asked.threads is None:
        return Cells(asked.cells), []
    torch.set_num_threads(asked.threads)
    return Cells(asked.cells), ["--threads", str(asked.threads)]


def train(arm: str, run: Path, kimg: float, changes: Changes, flags: Sequence[str]) -> None:
    """Train to `kimg` in a process of its own, going on where an earlier one was stopped.

    Raises:
        subprocess.CalledProcessError: training failed; what it said stays in RUN.log.
        KeyboardInterrupt: it was stopped by a signal, and saved.
    """
    command = [sys.executable, str(ROOT / "fastgan" / "train.py")]
    if checkpoint.existing(run):
        command += ["--resume", str(run)]
    else:
        command += ["--variant", ARMS[arm][0], "--preset", "digits", *as_flags(changes), "--kimg", f"{kimg:g}", *flags]
        command += [*(["--resume"] if (run / "config.yaml").is_file() else ["--out"]), str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_name(f"{run.name}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    # Training that a signal stopped saves, and ends as well as any.
    if float(checkpoint.existing(run)[-1].name.removeprefix("kimg-")) < kimg:
        raise KeyboardInterrupt


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the range where there are several."""
    mean = sum(values) / len(values)
    text = format(mean, form)
    return text if len(values) < 2 else f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
