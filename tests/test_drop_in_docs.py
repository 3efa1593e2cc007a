"""docs/drop-in.md: every line of its tables names a test that exists."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "drop-in.md"


def rows() -> list[list[str]]:
    tables = [part for part in PAGE.read_text().split("\n\n") if part.startswith("| what |")]
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_line_names_a_test_that_exists() -> None:
    assert len(rows()) > 25
    for what, _, test in rows():
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name.startswith("test_") and name in functions, f"{what}: there is no {test}"


def test_the_products_on_the_page_are_those_that_are_counted() -> None:
    counted = ast.parse((TESTS / "benchmarks" / "test_convert.py").read_text())
    values = next(
        ast.literal_eval(node.value)
        for node in counted.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRODUCTS"
    )
    text = " ".join(PAGE.read_text().split())
    for name, words in (("residual", "residual"), ("blurred", "blur"), ("biggan", "spectral norm")):
        assert f"{words} {values[name][0]} and {values[name][1]}" in text, name
