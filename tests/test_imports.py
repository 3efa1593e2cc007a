"""Which room may import which, and that no module takes part in an import cycle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.import_graph import GRAPH, MODULES, PACKAGE, imported_modules, room_of

# Room -> rooms it may import, besides itself. What a room is: scripts/import_graph.py.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "utils": {"errors", "kernels"},
    "kernels": set(),
    "ops": {"ops.dispatch", "ops.qualification", "kernels", "utils"},
    "ops.dispatch": {"kernels", "utils"},
    "ops.qualification": {"ops", "ops.dispatch", "kernels", "utils"},
    "functional": {"ops"},
    "nn": {"functional", "ops", "ops.dispatch"},
    "integrations": {"nn", "ops"},
    "objectives": {"ops", "ops.dispatch"},
    "compiled": {"ops", "ops.dispatch", "utils"},
    "models": {"ops", "nn", "utils"},
    "config": {"errors", "utils"},
    "checkpoint": {"errors", "utils"},
    "planning": {"config", "errors", "utils"},
    "data": {"data.loading", "data.preparation", "data.prepared", "data.sources", "errors", "utils"},
    "data.sources": {"data", "errors", "utils"},
    "data.prepared": {"data", "errors", "utils"},
    "data.loading": {"data", "errors", "ops", "ops.dispatch", "utils"},
    "data.preparation": {"data", "data.prepared", "data.sources", "errors", "utils"},
    "evaluation": {"data", "errors", "generator", "utils"},
    "export": {"", "config", "errors", "models", "ops.qualification", "utils"},
    "explorer": {"data", "errors", "generator", "utils"},
    "projection": {"data", "errors", "evaluation", "generator", "ops.qualification", "utils"},
    "video": {"data", "errors", "generator", "utils"},
    "generator": {"checkpoint", "errors", "export", "models", "ops.qualification", "trained", "utils"},
    "trained": {"errors"},
    "training.observability": {"", "checkpoint", "data", "errors", "utils"},
    "training.resilience": {"training.observability", "checkpoint", "errors", "utils"},
    "training.distributed": {"training.observability", "training.resilience", "", "config", "errors", "utils"},
    "training.compiling": {
        *(
            "training",
            "training.distributed",
            "training.observability",
            "compiled",
            "config",
            "data",
            "models",
            "ops",
            "ops.qualification",
        ),
        "utils",
    },
    "training.checkpoints": {
        *(
            "training.distributed",
            "training.observability",
            "",
            "checkpoint",
            "config",
            "errors",
            "models",
            "ops",
            "ops.qualification",
        ),
        "utils",
    },
    "training": {
        *(
            "training.compiling",
            "training.checkpoints",
            "training.distributed",
            "training.observability",
            "training.resilience",
        ),
        *(
            "",
            "checkpoint",
            "config",
            "data",
            "data.preparation",
            "data.prepared",
            "errors",
            "evaluation",
            "generator",
            "models",
            "nn",
            "objectives",
            "ops",
            "ops.qualification",
        ),
        *("export", "planning", "trained", "utils"),
    },
    # Commands put everything together, and nothing imports them but the files that start them.
    "cli": {
        *("", "checkpoint", "config", "data", "data.loading", "data.preparation", "data.prepared", "errors"),
        *(
            "evaluation",
            "explorer",
            "export",
            "generator",
            "models",
            "ops",
            "ops.dispatch",
            "ops.qualification",
            "planning",
            "projection",
            "trained",
            "training",
            "video",
        ),
        *("training.checkpoints", "training.distributed", "training.observability", "training.resilience", "utils"),
    },
    "__main__": {"cli"},
    "train": {"", "cli"},
    "evaluate": {"", "cli"},
    "": {"compiled", "generator", "utils"},  # fastgan/__init__.py: functions that import what they call
}


def test_every_room_is_known() -> None:
    unknown = {room_of(name) for name in MODULES} - ARROWS.keys()
    assert not unknown, f"say in ARROWS what {unknown} may import"
    empty = ARROWS.keys() - {room_of(name) for name in MODULES}
    assert not empty, f"ARROWS has rooms that are not there: {empty}"


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    for name in (name for name in MODULES if room_of(name) == room):
        wrong = {room_of(target) for target in GRAPH[name]} - ARROWS[room] - {room}
        assert not wrong, (
            f"{name} imports {wrong}; {room or 'fastgan'} may import {ARROWS[room] or 'nothing'} of fastgan"
        )


def test_arrows_make_no_circle() -> None:
    """But a folder's own files and its sub-rooms: what they share lies beside them."""
    levels: set[str] = set()
    left = {room: {b for b in below if not b.startswith(f"{room}.")} for room, below in ARROWS.items() if room}
    while left:
        free = {room for room, below in left.items() if below - {""} <= levels}
        assert free, f"these rooms import each other in a circle: {sorted(left)}"
        levels |= free
        left = {room: below for room, below in left.items() if room not in free}


def test_no_module_is_in_an_import_cycle() -> None:
    left = dict(GRAPH)
    while True:
        free = {name for name, targets in left.items() if not targets & left.keys()}
        if not free:
            break
        left = {name: targets for name, targets in left.items() if name not in free}
    # What is left is in a cycle, or imports one: only the first have an importer among them, over and over.
    while True:
        imported = set().union(*left.values()) if left else set()
        kept = {name: targets for name, targets in left.items() if name in imported}
        if len(kept) == len(left):
            break
        left = kept
    assert not left, f"modules that import each other: {sorted(left)}"


def test_the_scan_sees_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    for text, found in {
        "import fastgan.nn.layers": {"fastgan.nn.layers"},
        "from fastgan import models as m, data": {"fastgan.models", "fastgan.data"},
        "from fastgan.training.ema import Ema": {"fastgan.training.ema"},
        "from fastgan import __version__": {"fastgan"},
        "def f():\n    from ..nn import layers": {"fastgan.nn.layers"},
        "from . import penalty": {"fastgan.ops.penalty"},
        "from fastgan.kernels.tiles import Tile": {"fastgan.kernels.tiles"},
        "if TYPE_CHECKING:\n    from fastgan.training.ema import Ema": set(),
        "import torch, os.path": set(),
    }.items():
        file.write_text(text)
        assert imported_modules(file, "fastgan.ops.x") == found, text
    assert "fastgan.training.trainer" in GRAPH["fastgan.cli.train"]  # imported inside a function
    assert room_of("fastgan.training.resilience.signals") == "training.resilience"
    assert room_of("fastgan.training.trainer") == "training" and room_of("fastgan.ops.conv") == "ops"


def test_importing_ops_needs_torch_alone() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastgan.ops
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    new = done.stdout.split()
    assert "fastgan.ops.penalty" in new
    roots = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert roots <= {"fastgan", "torch"}, roots
    assert {name.split(".")[1] for name in new if name.startswith("fastgan.")} <= {"ops", "kernels", "utils"}
