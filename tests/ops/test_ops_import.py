from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgan

PACKAGE = Path(fastgan.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

# Room -> rooms it may import, besides itself (architecture.md, "Which way things flow").
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"kernels"},
    "nn": {"ops"},
    "models": {"ops", "nn"},
    "objectives": {"ops"},
    "data": {"errors", "ops"},
    "errors": set(),
    "noise": set(),
    "config": {"errors"},
    "checkpoint": {"errors"},
    "variants": {"config"},
    "evaluation": {"data", "errors", "noise"},
    "exporting": {"errors", "models"},
    "trained": {"checkpoint", "errors", "exporting", "models", "noise"},
}
# Commands may import everything; so may training, except the commands.
COMMANDS = {
    "train",
    "plan",
    "sample",
    "doctor",
    "evaluate",
    "export",
    "importer",
    "explore",
    "prepare",
    "dataset",
    "commands",
}
COMMANDS |= {"__init__", "__main__"}


def modules() -> Iterator[tuple[str, str, Path]]:
    """(room, dotted name, file) of every file of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], ".".join(("fastgan", *parts)), file
    for file in sorted(KERNELS.rglob("*.py")):
        yield "kernels", ".".join(("fastgan", "kernels", *file.relative_to(KERNELS).with_suffix("").parts)), file


def imported_rooms(file: Path, name: str) -> set[str]:
    """Rooms of fastgan that `file` imports, wherever in the file."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: -node.level]
                base = ".".join([*package, base] if base else package)
            found += [f"{base}.{alias.name}" for alias in node.names] if base == "fastgan" else [base]
    split = [target.split(".") for target in found]
    return {parts[1] if len(parts) > 1 else "__init__" for parts in split if parts[0] == "fastgan"}


def test_every_room_is_known() -> None:
    rooms = {room for room, _, _ in modules()}
    assert {"ops", "nn", "models", "objectives", "data", "training", "evaluation", "kernels"} <= rooms
    unknown = rooms - set(ARROWS) - COMMANDS - {"training"}
    assert not unknown, f"say in ARROWS what {unknown} may import"


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_arrows_do_not_turn_back(room: str) -> None:
    seen = 0
    for its_room, name, file in modules():
        if its_room == room:
            seen += 1
            wrong = imported_rooms(file, name) - ARROWS[room] - {room, "__init__"}
            assert not wrong, f"{file} imports {wrong}; {room} may import {ARROWS[room] or 'nothing'} of fastgan"
            # `import fastgan.x` and `from fastgan import __version__` run fastgan/__init__.py, which is empty of work.
            assert "__init__" not in imported_rooms(file, name)
    assert seen


def test_training_imports_no_command_and_nothing_below_imports_training() -> None:
    assert all("training" not in rooms for rooms in ARROWS.values())
    importers = {name for _, name, file in modules() if "training" in imported_rooms(file, name)}
    allowed = {f"fastgan.{c}" for c in COMMANDS}
    assert {name for name in importers if not name.startswith("fastgan.training.")} <= allowed
    assert "fastgan.train" in importers  # the scan does see imports inside functions
    for room, name, file in modules():
        if room == "training":
            assert not imported_rooms(file, name) & (COMMANDS - {"__init__"}), file


def test_the_scan_sees_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    for text, rooms in {
        "import fastgan.nn.layers": {"nn"},
        "from fastgan import models as m, data": {"models", "data"},
        "from fastgan.training.ema import Ema": {"training"},
        "def f():\n    from ..nn import layers": {"nn"},
        "from . import penalty": {"ops"},
        "import torch, os.path": set(),
    }.items():
        file.write_text(text)
        assert imported_rooms(file, "fastgan.ops.x") == rooms, text


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
    assert {name.split(".")[1] for name in new if name.startswith("fastgan.")} <= {"ops", "kernels"}
