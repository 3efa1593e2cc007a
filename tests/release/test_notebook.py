"""examples/first_look.ipynb: as Colab would run it, in an environment with the wheel, cell by cell, in one process."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installs import REPOSITORY, run

import fastgan

NOTEBOOK = json.loads((REPOSITORY / "examples" / "first_look.ipynb").read_text())

RUNNER = """
import ast, json, sys
names = {}
for number, source in enumerate(json.loads(open("cells.json").read())):
    tree = ast.parse(source, f"cell {number}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if last is not None:  # a notebook shows the value of a last expression
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        size = getattr(value, "size", None)
        print(f"[{number}] {type(value).__name__} {size if isinstance(size, tuple) else value}")
assert names["fastgan"].__file__.startswith(sys.prefix)
"""


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_one_and_has_no_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    identifiers: list[Any] = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    install, *others = code_cells()
    assert install.startswith("%pip install") and f"fastgan-{fastgan.__version__}-py3-none-any.whl" in install
    for source in others:
        ast.parse(source)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_cell_runs_with_the_wheel(
    build: Callable[..., Path], install: Callable[[Path], Path], tmp_path: Path
) -> None:
    python = install(build("wheel", FASTGAN_BUILD="0"))
    cells = [source.replace("KIMG = 20.0", "KIMG = 0.2").replace("IMAGES = 2000", "IMAGES = 64")
             for source in code_cells()[1:]]  # fmt: skip
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    environment = {"FASTGAN_BUILD": "0", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    output = run(python, "-c", RUNNER, folder=tmp_path, **environment)
    assert output.startswith(fastgan.__version__)
    side = 2 * fastgan.load("avatars").meta["networks"]["resolution"]
    assert f"Image ({8 * side}, {4 * side})" in output and "Image (512, 256)" in output
    assert "'frechet_distance': " in output and "fastgan: second derivative with norm" in output
