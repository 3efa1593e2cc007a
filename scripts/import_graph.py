"""Which module of the package imports which, and in which room each is.

A room is a folder or a file of fastgan/; those of `SPLIT` are divided into their sub-folders.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastgan"
KERNELS = ROOT / "kernels"

SPLIT = ("data", "ops", "training")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the package and of kernels/."""
    found = {}
    for folder, prefix in ((PACKAGE, ("fastgan",)), (KERNELS, ("fastgan", "kernels"))):
        for file in sorted(folder.rglob("*.py")):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            if parts != ("fastgan", "kernels", "__init__") or folder == KERNELS:
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def room_of(name: str) -> str:
    """fastgan.training.resilience.signals -> training.resilience; fastgan.ops.conv -> ops; fastgan -> ""."""
    parts = name.split(".")[1:]
    divided = len(parts) > 1 and parts[0] in SPLIT and f"fastgan.{parts[0]}.{parts[1]}" in MODULES
    is_folder = divided and MODULES[f"fastgan.{parts[0]}.{parts[1]}"].name == "__init__.py"
    return ".".join(parts[:2]) if is_folder else ".".join(parts[:1])


def imports(file: Path, name: str) -> Iterator[str]:
    """What `file` imports, wherever in the file; not what it imports for type checkers alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(file: Path, name: str) -> set[str]:
    """Modules of the package that `file` imports."""
    found = set()
    for target in imports(file, name):
        while target and target not in MODULES:
            target = target.rpartition(".")[0]
        if target and target != name:
            found.add(target)
    return found


GRAPH = {name: imported_modules(file, name) for name, file in MODULES.items()}
