"""Long comparisons in cells: each is computed once, kept in a JSON file, and a table is made of those that are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgan import checkpoint
from fastgan.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
# Sizes that make the generators equally large within a tenth, whatever the presets': 100,000 parameters at 16 px and
# three channels, 165,000 at 32 px and one. Everything else is the digits preset's.
NETWORKS = {
    16: {
        "mlp": ["--width", "100"],
        "dcgan": ["--width", "32", "--max-width", "64"],
        "sagan": ["--width", "16", "--max-width", "64"],
        "pggan": ["--fmap-base", "256", "--fmap-max", "41"],
    },
    32: {
        "mlp": ["--width", "134"],
        "dcgan": ["--width", "32", "--max-width", "64"],
        "sagan": ["--width", "16", "--max-width", "59"],
        "pggan": ["--fmap-base", "256", "--fmap-max", "53"],
    },
}


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


def train(variant: str, resolution: int, run: Path, kimg: float, flags: Sequence[str]) -> None:
    """Train to `kimg` in a process of its own, going on where an earlier one was stopped.

    Raises:
        subprocess.CalledProcessError: training failed; what it said stays in RUN.log.
        KeyboardInterrupt: it was stopped by a signal, and saved.
    """
    command = [sys.executable, str(ROOT / "fastgan" / "train.py")]
    if checkpoint.existing(run):
        command += ["--resume", str(run)]
    else:
        model = VARIANTS[variant].digits.networks.model
        fresh = ["--variant", variant, "--preset", "digits", "--resolution", str(resolution), "--kimg", f"{kimg:g}"]
        fresh += [*NETWORKS[resolution][model], *flags]
        command += [*fresh, *(["--resume"] if (run / "config.yaml").is_file() else ["--out"]), str(run)]
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
