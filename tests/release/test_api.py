"""docs/api.md lists what the packages export, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from installs import REPOSITORY

TEXT = (REPOSITORY / "docs" / "api.md").read_text()
SECTIONS = dict(re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
WITHOUT_TABLE = {"fastgan.functional"}  # whose names are torch's


def names_in(section: str) -> list[str]:
    """The names in the first column of a section's table."""
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


@pytest.mark.parametrize("package", sorted(SECTIONS.keys() - WITHOUT_TABLE))
def test_the_page_lists_what_is_exported(package: str) -> None:
    module, listed = importlib.import_module(package), names_in(SECTIONS[package])
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(module.__all__)
    for name in listed:
        value = getattr(module, name)
        if inspect.isfunction(value) or (inspect.isclass(value) and value.__module__.startswith("fastgan")):
            assert value.__doc__, f"{package}.{name} has no docstring"


def test_attributes_of_a_generator() -> None:
    from fastgan.generator import TrainedGenerator

    (row,) = [line for line in SECTIONS["fastgan.generator"].splitlines() if line.startswith("| `TrainedGenerator`")]
    listed = set(re.findall(r"`(\w+)`", row.split("|")[2]))
    public = {name for name in vars(TrainedGenerator) if name[0] != "_"} | {"module", "meta"}
    assert listed == public


def test_links_lead_to_pages() -> None:
    for target in re.findall(r"\]\(([\w.-]+\.md)\)", TEXT):
        assert (REPOSITORY / "docs" / target).is_file(), target
