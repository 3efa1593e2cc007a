"""No function has more than 60 lines, its docstring included, and no file more than 500. Kernels are not counted."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("top", ["fastgan", "scripts"])
def test_files_and_functions_are_short(top: str) -> None:
    long = []
    for path in sorted((ROOT / top).rglob("*.py")):
        if path.is_relative_to(ROOT / "fastgan" / "kernels"):  # a link to kernels/
            continue
        text = path.read_text()
        if len(text.splitlines()) > 500:
            long.append(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= 60:
                    long.append(f"{path}: {node.name}")
    assert not long
